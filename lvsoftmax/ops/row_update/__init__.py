"""Updates of some rows of a table: a step's rows among a million, or all of them.

The kernel reads and writes each row once, on the CPU in float32; plain PyTorch, which serves everything else and any
machine without a C++ compiler, takes a pass over the rows, and a fresh array of their size, for every operation. Where
all rows are updated (``row_U`` is None) it does so by blocks of rows, so that no array has the size of the table.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lvsoftmax.ops.backends import Backends, CppLibrary
from lvsoftmax.ops.row_update import reference

__all__ = ["BACKENDS", "adagrad_rows", "adam_rows", "sgd_rows"]

LIBRARY = CppLibrary(Path(__file__).with_name("kernel.cpp"))
BACKENDS = Backends(cpp=LIBRARY.obstacle)

BLOCK = 2**18
"""Numbers of a block of rows."""


def sgd_rows(
    table: Tensor,
    velocity: Tensor | None,
    row_U: Tensor | None,
    gradient: Tensor,
    *,
    lr: float | Tensor,
    momentum: float,
    decay: float,
) -> None:
    """Update as :func:`reference.sgd_rows` does."""
    if not gradient.numel():
        return
    states = () if velocity is None else (velocity,)
    if not _kernel_serves(gradient, table, *states):
        numbers = {"lr": lr, "momentum": momentum, "decay": decay}
        _plainly(reference.sgd_rows, table, (velocity,), row_U, gradient, numbers)
        return
    increment_version((table, *states))
    LIBRARY.call("sgd_rows", table, velocity, row_U, gradient.contiguous(), *_sizes(gradient), float(lr),
                 float(momentum), float(decay), torch.get_num_threads())  # fmt: skip


def adagrad_rows(
    table: Tensor,
    sum: Tensor,
    row_U: Tensor | None,
    gradient: Tensor,
    *,
    lr: float | Tensor,
    epsilon: float,
    decay: float,
) -> None:
    """Update as :func:`reference.adagrad_rows` does."""
    if not gradient.numel():
        return
    if not _kernel_serves(gradient, table, sum):
        numbers = {"lr": lr, "epsilon": epsilon, "decay": decay}
        _plainly(reference.adagrad_rows, table, (sum,), row_U, gradient, numbers)
        return
    increment_version((table, sum))
    LIBRARY.call("adagrad_rows", table, sum, row_U, gradient.contiguous(), *_sizes(gradient),
                 _one_square_per_row(sum, table), float(lr), float(epsilon), float(decay),
                 torch.get_num_threads())  # fmt: skip


def adam_rows(
    table: Tensor,
    first: Tensor,
    second: Tensor,
    row_U: Tensor | None,
    gradient: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    corrections: tuple[Tensor, Tensor],
    epsilon: float,
    decay: float,
) -> None:
    """Update as :func:`reference.adam_rows` does."""
    if not gradient.numel():
        return
    if not _kernel_serves(gradient, table, first, second):
        numbers = {"lr": lr, "betas": betas, "corrections": corrections, "epsilon": epsilon, "decay": decay}
        _plainly(reference.adam_rows, table, (first, second), row_U, gradient, numbers)
        return
    numbers = map(float, (lr, *betas, *corrections, epsilon, decay))
    increment_version((table, first, second))
    LIBRARY.call("adam_rows", table, first, second, row_U, gradient.contiguous(), *_sizes(gradient),
                 _one_square_per_row(second, table), *numbers, torch.get_num_threads())  # fmt: skip


def _kernel_serves(gradient: Tensor, *in_place: Tensor) -> bool:
    for tensor in in_place:
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            return False
    return gradient.dtype == torch.float32 and BACKENDS.choose("auto", gradient.device) == "cpp"


def _sizes(gradient: Tensor) -> tuple[int, int]:
    """Return the rows, and the numbers in each."""
    rows = len(gradient)
    return rows, gradient.numel() // rows


def _one_square_per_row(squares: Tensor, table: Tensor) -> bool:
    """Return whether the state of squares has one number per row."""
    return squares.numel() < table.numel()


def _plainly(
    update: Callable[..., None],
    table: Tensor,
    states: tuple[Tensor | None, ...],
    row_U: Tensor | None,
    gradient: Tensor,
    numbers: dict[str, Any],
) -> None:
    if row_U is not None:
        update(table, *states, row_U, gradient, **numbers)
        return
    if table.ndim == 0:
        table, gradient = table.view(1), gradient.view(1)
        states = tuple(None if state is None else state.view(1) for state in states)
    rows = max(BLOCK // table[0].numel(), 1)
    every = torch.arange(rows, device=table.device)
    for start in range(0, len(table), rows):
        block = slice(start, start + rows)
        part = gradient[block]
        own = [None if state is None else state[block] for state in states]
        update(table[block], *own, every[: len(part)], part, **numbers)
