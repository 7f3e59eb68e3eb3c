"""The loss that everybody writes: all logits, then ``cross_entropy``; as it is, and through ``torch.compile``."""

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.bench.cell import Cell, TorchInstance, dense_table

VARIANTS = {"PyTorch, eager": {"compile": False}, "PyTorch, compiled": {"compile": True}}
PACKAGE = "torch"
INSTALL = "torch, and a C++ compiler for torch.compile"
EXACT = True


def build(cell: Cell, *, compile: bool) -> TorchInstance:
    """Build it."""
    weight, bias = dense_table(cell)

    def mean(hidden: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight, bias).float(), target)

    def each(hidden: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight, bias).float(), target, reduction="none")

    if compile:
        mean, each = (torch.compile(function, dynamic=False) for function in (mean, each))
    return TorchInstance(
        cell,
        [weight, bias],
        lambda hidden, target, previous: each(hidden, target),
        lambda hidden, target, factor, previous: mean(hidden, target),
        counted=not compile,
    )
