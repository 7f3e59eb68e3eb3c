"""Cut cross-entropy, Wijmans et al. 2025: on the CPU its path through ``torch.compile``, on CUDA its kernels."""

import torch

from experiments.bench.cell import Cell, TorchInstance, dense_table

VARIANTS = {"cut-cross-entropy": {}}
PACKAGE = "cut-cross-entropy"
INSTALL = "pip install cut-cross-entropy triton"
EXACT = True


def build(cell: Cell) -> TorchInstance:
    """Build it; it knows no bias."""
    from cut_cross_entropy import linear_cross_entropy

    weight, _ = dense_table(cell)
    implementation = "torch_compile" if torch.device(cell.device).type == "cpu" else "cce"

    def loss(hidden: torch.Tensor, target: torch.Tensor, reduction: str) -> torch.Tensor:
        # Autocast does not reach its kernels.
        table = weight.to(hidden.dtype)
        return linear_cross_entropy(hidden, table, target, reduction=reduction, impl=implementation)

    return TorchInstance(
        cell,
        [weight],
        lambda hidden, target, previous: loss(hidden, target, "none"),
        lambda hidden, target, factor, previous: loss(hidden, target, "mean"),
        counted=False,
    )
