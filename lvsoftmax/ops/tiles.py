"""What those who run Triton kernels have in common: sizes of tiles, memory and precisions."""

from collections.abc import Sequence

import torch
from torch import Tensor

INTERPRETED = 128
"""Rows of a tile in Triton's interpreter, which spends its time on programs and not on numbers."""


def tile_size(rows: int, like: Tensor, most: int) -> int:
    """Return how many of so many rows one program takes, a power of two and ``most`` on a device made for it."""
    return min(next_power_of_2(rows), most if like.is_cuda else INTERPRETED)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is not smaller: what a tile is wide."""
    return 1 << max(number - 1, 0).bit_length()


def ratio(whole: int, part: int) -> int:
    """Return how many parts there are, the last one perhaps smaller."""
    return -(-whole // part)


def dense_rows(x: Tensor) -> Tensor:
    """Return ``x`` with each row in one stretch; what lies between the rows is no matter."""
    return x if x.stride(1) == 1 else x.contiguous()


def empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Return memory on the device of ``like``, in the precision of sums of it."""
    return like.new_empty(shape, dtype=torch.promote_types(like.dtype, torch.float32))


def sum_type(x: Tensor):
    """Return Triton's name for the precision in which numbers like ``x`` are summed."""
    import triton.language as tl

    return tl.float64 if x.dtype == torch.float64 else tl.float32
