"""flash-linear-attention's fused linear cross-entropy: CUDA only."""

import torch

from experiments.bench.cell import Cell, TorchInstance, Unavailable, dense_table

VARIANTS = {"flash-linear-attention": {}}
PACKAGE = "flash-linear-attention"
INSTALL = "pip install flash-linear-attention"
EXACT = True


def build(cell: Cell) -> TorchInstance:
    """Build it."""
    if torch.device(cell.device).type != "cuda":
        raise Unavailable("runs on CUDA only")
    from fla.modules import FusedLinearCrossEntropyLoss

    weight, bias = dense_table(cell)
    loss = FusedLinearCrossEntropyLoss()

    def mean(hidden: torch.Tensor, target: torch.Tensor, factor: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        return loss(hidden, target, weight.to(hidden.dtype), bias.to(hidden.dtype))

    return TorchInstance(cell, [weight, bias], None, mean, counted=False)
