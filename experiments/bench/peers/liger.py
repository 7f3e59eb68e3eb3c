"""Liger-Kernel's fused linear cross-entropy, Hsu et al. 2024: CUDA only."""

import torch

from experiments.bench.cell import Cell, TorchInstance, Unavailable, dense_table

VARIANTS = {"Liger-Kernel": {}}
PACKAGE = "liger-kernel"
INSTALL = "pip install liger-kernel"
EXACT = True


def build(cell: Cell) -> TorchInstance:
    """Build it."""
    if torch.device(cell.device).type != "cuda":
        raise Unavailable("runs on CUDA only")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    weight, bias = dense_table(cell)
    loss = LigerFusedLinearCrossEntropyLoss()

    def mean(hidden: torch.Tensor, target: torch.Tensor, factor: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        return loss(weight.to(hidden.dtype), hidden, target, bias.to(hidden.dtype))

    return TorchInstance(cell, [weight, bias], None, mean, counted=False)
