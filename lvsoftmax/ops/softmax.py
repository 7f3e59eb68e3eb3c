"""The softmax family in safe form: sums in float32 at least, any ``dim``, any shape."""

import torch
from torch import Tensor

from lvsoftmax.ops.numerics import upcast


def log_softmax(logits: Tensor, dim: int = -1) -> Tensor:
    """Return ``logits - logsumexp(logits)``."""
    return torch.log_softmax(upcast(logits), dim)


def logsumexp(logits: Tensor, dim: int = -1) -> Tensor:
    """Return ``log(sum(exp(logits)))``."""
    return torch.logsumexp(upcast(logits), dim)


def gumbel_argmax(log_weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one index of the last dimension with probability proportional to ``exp(log_weight)``.

    The Gumbel-max trick: the index of the largest ``log_weight + g`` with independent standard Gumbel ``g``. The noise
    is ``-log`` of a standard exponential, which is never zero for the generator used here.
    """
    noise = torch.empty_like(upcast(log_weight)).exponential_(generator=generator).log_()
    return (upcast(log_weight) - noise).argmax(-1)
