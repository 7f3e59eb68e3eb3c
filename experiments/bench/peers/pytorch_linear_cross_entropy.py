"""``torch.nn.functional.linear_cross_entropy`` by chunks, which came with PyTorch 2.13.

Without options that function is the eager loss; with them it never holds all logits.
"""

import torch.nn.functional as F

from experiments.bench.cell import Cell, TorchInstance, dense_table

VARIANTS = {
    "F.linear_cross_entropy, default options": {},
    "F.linear_cross_entropy, chunks of 512": {"chunking_method": None, "batch_chunk_size": 512},
}
PACKAGE = "torch"
INSTALL = "pip install 'torch>=2.13'"
EXACT = True


def build(cell: Cell, **options: int | None) -> TorchInstance:
    """Build it."""
    from torch.nn import LinearCrossEntropyOptions

    weight, bias = dense_table(cell)
    chosen = LinearCrossEntropyOptions(**options)
    return TorchInstance(
        cell,
        [weight, bias],
        None,
        lambda hidden, target, factor, previous: F.linear_cross_entropy(
            hidden, weight, target, linear_bias=bias, options=chosen
        ),
        counted=False,
    )
