"""Exact softmax trained to be normalised already, so that scores can be used as log-probabilities."""

import math
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from lvsoftmax.layer import DenseOutputLayer
from lvsoftmax.ops.linear_cross_entropy import (
    BACKENDS,
    linear_cross_entropy_and_logsumexp,
    linear_cross_entropy_loss,
)
from lvsoftmax.ops.noise import Draws


class SelfNormalizedSoftmax(DenseOutputLayer):
    """Trains on the likelihood and a penalty that draws the log-partition to zero; evaluates the exact softmax.

    With logits ``s`` and ``log Z = log sum_w exp(s_w)``::

        objective = -s_t + log Z + strength (log Z)^2

    The optimum is the softmax's, ``s = log p``, the one of its many forms that is normalised: the penalty is zero there
    and costs nothing in likelihood. Training is no cheaper than the full softmax's; what is gained is that a score can
    be read off a trained model without the sum over the vocabulary. Mean and variance of ``log Z``, which evaluation
    reports, tell how far to trust it. This is the z-loss of later language models.

    Training starts with the bias at the log of the words' frequencies, and so with ``log Z`` near 0; Devlin et al. have
    it at ``-log V`` to the same end.

    Cost per token: ``6 D V`` FLOPs for a training step, ``2 D V`` for evaluation; memory of one block of logits.

    Reference: Devlin, Zbib, Huang, Lamar, Schwartz & Makhoul 2014, Fast and Robust Neural Network Joint Models for
    Statistical Machine Translation, equation 4 (``alpha`` there is ``strength``).

    Args:
        hidden_size: D.
        counts: ``[vocab]`` training frequency of each word, non-increasing.
        strength: factor of the penalty, not negative; 0.1 in the paper.
        bias: whether words have a bias.
        backend: what computes loss and gradients; ``auto`` takes the fastest that can run on the device.

    Raises:
        ValueError: ``strength`` is negative or not finite; ``backend`` cannot run here.
    """

    backends = BACKENDS

    def __init__(
        self,
        hidden_size: int,
        counts: Tensor,
        *,
        strength: float = 0.1,
        bias: bool = True,
        backend: Literal["auto", "eager", "cpp", "triton"] = "auto",
    ) -> None:
        super().__init__(hidden_size, counts, bias=bias, backend=backend)
        if not (math.isfinite(strength) and strength >= 0):
            raise ValueError(f"strength={strength}: must be finite and not negative; 0 is the full softmax")
        self.strength = strength

    def forward(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Draws = None,
    ) -> Float[Tensor, "tokens"]:
        """Return the negative log-likelihood and the penalty."""
        nll, log_partition = linear_cross_entropy_and_logsumexp(
            hidden, self.weight, self.bias, target, backend=self.backend
        )
        return nll + self.strength * log_partition.square()

    def loss(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        weight: Float[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Draws = None,
    ) -> Float[Tensor, ""]:
        """Return ``sum(weight * forward)``, its gradients computed on the way."""
        return linear_cross_entropy_loss(
            hidden, self.weight, self.bias, target, weight, z_loss=self.strength, backend=self.backend
        )
