"""``torch.nn.AdaptiveLogSoftmaxWithLoss``, Grave et al. 2017 as PyTorch has it."""

import torch

from experiments.bench.cell import Cell, TorchInstance, Unavailable

VARIANTS = {"torch.nn.AdaptiveLogSoftmaxWithLoss": {"shares": (0.05, 0.5)}}
PACKAGE = "torch"
INSTALL = "pip install torch"
EXACT = False


def build(cell: Cell, *, shares: tuple[float, ...]) -> TorchInstance:
    """Build it with bands that end at these shares of the vocabulary."""
    if cell.precision == "bf16":
        raise Unavailable("mixes precisions under autocast and fails")
    cutoffs = sorted({max(1, int(share * cell.vocab)) for share in shares})
    layer = torch.nn.AdaptiveLogSoftmaxWithLoss(cell.hidden, cell.vocab, cutoffs)
    layer.to(cell.device, cell.parameter_dtype)
    return TorchInstance(
        cell,
        layer.parameters(),
        lambda hidden, target, previous: -layer(hidden, target).output,
        lambda hidden, target, factor, previous: layer(hidden, target).loss,
    )
