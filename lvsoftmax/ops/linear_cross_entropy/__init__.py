"""Cross-entropy of a linear layer's logits without ever holding ``[tokens, vocab]``."""

from lvsoftmax.ops.linear_cross_entropy.autograd import (
    BACKENDS,
    linear_cross_entropy,
    linear_cross_entropy_and_logsumexp,
    linear_cross_entropy_loss,
    linear_logsumexp,
    soft_capped,
)
from lvsoftmax.ops.linear_cross_entropy.banded import banded_cross_entropy, banded_cross_entropy_loss
from lvsoftmax.ops.linear_cross_entropy.normalised import (
    NORMALISED_BACKENDS,
    normalised_cross_entropy,
    normalised_cross_entropy_loss,
)

__all__ = [
    "BACKENDS",
    "NORMALISED_BACKENDS",
    "banded_cross_entropy",
    "banded_cross_entropy_loss",
    "linear_cross_entropy",
    "linear_cross_entropy_and_logsumexp",
    "linear_cross_entropy_loss",
    "linear_logsumexp",
    "normalised_cross_entropy",
    "normalised_cross_entropy_loss",
    "soft_capped",
]
