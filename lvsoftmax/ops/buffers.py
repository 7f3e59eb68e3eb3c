"""Memory for large tensors: for results that every step makes anew, and for tables that are read in any order.

The first touch of fresh memory is a page fault per 4 KiB, and costs several times as much as writing the numbers. Large
tensors are given back to the system when they die, so that a gradient ``[V, D]`` pays for this at every step. What
:func:`recycled` returns is an ordinary tensor on memory that is kept when the tensor, and everything that shares its
storage, has died, and serves the next tensor of that size. A table stays, but where its rows lie must be looked up at
every step: :func:`empty_table`.
"""

import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

SMALLEST = 2**20
"""Bytes below which the C library itself keeps memory for reuse."""

PATIENCE: float = 64
"""Requests, of any size, after which memory that served none of them goes back to the system."""

ALIGNMENT = 64
"""Bytes: a cache line, and the widest register."""

_free: list[tuple[int, np.ndarray]] = []  # (number of requests when it became free, memory), oldest first
_requests = 0
_taking = threading.Lock()


def empty_like(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor on the device of ``like``, on recycled memory where that is possible."""
    real = type(like) in (Tensor, Parameter) and not torch.compiler.is_compiling()
    return recycled(shape, dtype) if real and like.is_cpu else like.new_empty(shape, dtype=dtype)


def empty_rows(like: Tensor, rows: int, width: int) -> Tensor:
    """Return an uninitialised tensor ``[rows, width]`` for a number of rows that differs from step to step.

    The memory has room for up to a quarter more, so that it serves other numbers nearby.
    """
    step = 2 ** max(rows.bit_length() - 3, 0)
    return empty_like(like, (-(-rows // step) * step, width), like.dtype)[:rows]


def recycled(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor on the CPU, on memory that has been touched before if there is some."""
    size = math.prod(shape) * dtype.itemsize
    if size < SMALLEST:
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = _take(size + ALIGNMENT)
    # The tensor's storage owns this view, and nobody else does: it dies when nothing shares the storage any more.
    view = _aligned(memory)
    weakref.finalize(view, _give, memory).atexit = False
    return torch.from_numpy(view).view(dtype).view(*shape)


def empty_table(rows: int, width: int, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """Return an uninitialised ``[rows, width]`` whose rows will be read in any order: ``torch.empty`` on huge pages.

    A table of a gigabyte has 4 KiB pages by the hundred thousand, and where each row lies must be looked up in memory,
    too. Linux gives pages of 2 MiB to who asks; on other systems, and devices, this is ``torch.empty``.
    """
    ordinary = torch.empty(rows, width, dtype=dtype, device=device)
    if type(ordinary) is not Tensor or not ordinary.is_cpu or ordinary.nbytes < SMALLEST:
        return ordinary
    view = _aligned(np.empty(ordinary.nbytes + ALIGNMENT, np.uint8))  # NumPy asks
    return torch.from_numpy(view).view(ordinary.dtype).view(rows, width)


@contextmanager
def kept() -> Iterator[None]:
    """Give nothing back to the system meanwhile: for steps between which many others are made."""
    global PATIENCE
    before, PATIENCE = PATIENCE, math.inf
    try:
        yield
    finally:
        PATIENCE = before


def waiting() -> int:
    """Return how many bytes wait for reuse."""
    return sum(len(memory) for _, memory in _free)


def release() -> None:
    """Give the memory that waits for reuse back to the system."""
    _free.clear()


def _take(size: int) -> np.ndarray:
    global _requests
    with _taking:
        _requests += 1
        while _free and _free[0][0] < _requests - PATIENCE:
            _free.pop(0)
        for position in reversed(range(len(_free))):
            if len(_free[position][1]) == size:
                return _free.pop(position)[1]
    # NumPy asks for huge pages where the system has them: fewer faults even for what is fresh.
    return np.empty(size, np.uint8)


def _aligned(memory: np.ndarray) -> np.ndarray:
    """Return all of some memory but what is before the first and behind the last cache line."""
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + len(memory) - ALIGNMENT]


def _give(memory: np.ndarray) -> None:
    _free.append((_requests, memory))
