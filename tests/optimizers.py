"""Optimisers by name, and a table with gradients for them."""

import pytest
import torch
from torch import nn

from lvsoftmax.optim import SGD, Adagrad, Adam

ROWS, WIDTH = 23, 5
OPTIMIZERS = {
    "sgd": lambda p, lr=0.1, **more: SGD(p, lr, **more),
    "momentum": lambda p, lr=0.1, **more: SGD(p, lr, momentum=0.9, **more),
    "adagrad": lambda p, lr=0.1, **more: Adagrad(p, lr, **more),
    "adagrad_start": lambda p, lr=0.1, **more: Adagrad(p, lr, initial_accumulator=0.3, epsilon=0.01, **more),
    "adam": lambda p, lr=0.1, **more: Adam(p, lr, betas=(0.8, 0.95), epsilon=1e-3, **more),
    "adagrad_row": lambda p, lr=0.1, **more: Adagrad(
        p, lr, accumulator="row", initial_accumulator=0.3, epsilon=0.01, **more
    ),
    "adam_row": lambda p, lr=0.1, **more: Adam(p, lr, betas=(0.8, 0.95), second_moment="row", epsilon=1e-3, **more),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def table(dtype=torch.float64, *shape: int) -> nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    return nn.Parameter(torch.randn(shape or (ROWS, WIDTH), generator=generator, dtype=dtype))


def gradient(step: int, ids: torch.Tensor, *width: int) -> torch.Tensor:
    """A row-sparse gradient with the duplicates of ``ids``, uncoalesced."""
    values = torch.randn(len(ids), *width, generator=torch.Generator().manual_seed(step + 1), dtype=torch.float64)
    return torch.sparse_coo_tensor(ids[None], values, (ROWS, *width), check_invariants=True)


def some_ids(step: int, count: int = 17) -> torch.Tensor:
    return torch.randint(ROWS - 4, (count,), generator=torch.Generator().manual_seed(step + 100))
