"""Where large results go."""

import math

import numpy as np
import torch
from torch import Tensor

LARGE = 2**25  # bytes; up to here, the C library gives memory out again that has been touched before


def is_large(size: tuple[int, ...], like: Tensor) -> bool:
    """Whether memory of this size for ``like``'s dtype would come from the system, untouched, at every step."""
    return like.device.type == "cpu" and math.prod(size) * like.element_size() >= LARGE


def zeros(size: tuple[int, ...], like: Tensor) -> Tensor:
    """Return zeros, of the device and dtype (float32 or float64) of ``like``, whose first touch is cheap.

    The first touch of a page costs the CPU a fault. Pages of 4 KiB, which PyTorch's allocator takes, come at about
    2 GB/s, so that the gradient of many rows would take longer to fault in than to compute. NumPy asks the kernel for
    pages of 2 MiB.
    """
    if like.device.type != "cpu":
        return like.new_zeros(size)
    return torch.from_numpy(np.empty(size, np.float64 if like.dtype == torch.float64 else np.float32)).zero_()
