"""The one place that decides precisions.

Rule: logits may be computed in whatever precision autocast asks for, but everything after the product (exponentials,
logarithms, sums over words or tokens) runs in float32, or in float64 when the input is float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """Return ``x`` in the precision of sums: float64 stays, everything else becomes float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def sum_dtype(x: Tensor) -> torch.dtype:
    """Return the precision of sums of what is computed from ``x``: float64 stays, everything else becomes float32."""
    return torch.promote_types(x.dtype, torch.float32)


def product_dtype(hidden: Tensor) -> torch.dtype:
    """Precision of a matrix product with ``hidden``: autocast's where it is on, otherwise that of ``hidden``.

    Needed by ``autograd.Function``s, whose backward pass autocast does not reach. float64 is never reduced.
    """
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def softplus(x: Tensor) -> Tensor:
    """Return ``log(1 + exp(x))`` to the last digit: PyTorch's default returns x from 20 on, which float64 can tell."""
    return F.softplus(x, threshold=40.0)
