"""Updates of some rows of a table: a step's rows among a million.

The kernel reads and writes each row once, on the CPU in float32; plain PyTorch, which serves everything else and any
machine without a C++ compiler, takes a pass over the rows, and a fresh array of their size, for every operation.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lvsoftmax.ops.backends import Backends, CppLibrary
from lvsoftmax.ops.row_update import reference
from lvsoftmax.ops.row_update.reference import subtract_rows

__all__ = ["BACKENDS", "adagrad_rows", "adam_rows", "subtract_rows"]

LIBRARY = CppLibrary(Path(__file__).with_name("kernel.cpp"))
BACKENDS = Backends(cpp=LIBRARY.obstacle)


def adagrad_rows(
    table: Tensor, sum: Tensor, row_U: Tensor, gradient: Tensor, *, lr: float | Tensor, epsilon: float, decay: float
) -> None:
    """Update as :func:`reference.adagrad_rows` does."""
    if not _kernel_serves(table, sum, gradient):
        reference.adagrad_rows(table, sum, row_U, gradient, lr=lr, epsilon=epsilon, decay=decay)
        return
    numbers = (float(lr), float(epsilon), float(decay))
    increment_version((table, sum))
    LIBRARY.call("adagrad_rows", table, sum, row_U, gradient.contiguous(), *_sizes(row_U, gradient), *numbers,
                 torch.get_num_threads())  # fmt: skip


def adam_rows(
    table: Tensor,
    first: Tensor,
    second: Tensor,
    row_U: Tensor,
    gradient: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    corrections: tuple[Tensor, Tensor],
    epsilon: float,
    decay: float,
) -> None:
    """Update as :func:`reference.adam_rows` does."""
    if not _kernel_serves(table, first, second, gradient):
        reference.adam_rows(table, first, second, row_U, gradient, lr=lr, betas=betas, corrections=corrections,
                            epsilon=epsilon, decay=decay)  # fmt: skip
        return
    numbers = map(float, (lr, *betas, *corrections, epsilon, decay))
    increment_version((table, first, second))
    LIBRARY.call("adam_rows", table, first, second, row_U, gradient.contiguous(), *_sizes(row_U, gradient), *numbers,
                 torch.get_num_threads())  # fmt: skip


def _kernel_serves(*tensors: Tensor) -> bool:
    table, *_ = tensors
    return (
        all(tensor.dtype == torch.float32 for tensor in tensors)
        and all(tensor.is_contiguous() for tensor in tensors[:-1])
        and BACKENDS.choose("auto", table.device) == "cpp"
    )


def _sizes(row_U: Tensor, gradient: Tensor) -> tuple[int, int]:
    return len(row_U), gradient[:1].numel() if len(row_U) else 1
