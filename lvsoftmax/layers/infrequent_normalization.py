"""Softmax whose normaliser is kept near one by a penalty on a few tokens, and ignored on the others."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lvsoftmax.layer import DenseOutputLayer
from lvsoftmax.ops.linear_cross_entropy import BACKENDS, linear_cross_entropy_and_logsumexp
from lvsoftmax.ops.noise import Selection
from lvsoftmax.ops.numerics import upcast


class InfrequentNormalization(DenseOutputLayer):
    """Trains on unnormalised scores, with a penalty on the log-partition of some tokens; evaluates the exact softmax.

    With logits ``s``, ``Z = sum_w exp(s_w)``, and M of the N tokens of a call drawn without replacement::

        objective = -s_t + (N / M) strength (log Z)^2    for the M tokens (squared), or -s_t + (N / M) log Z (linear)
        objective = -s_t                                 for the others

    The mean over the draws is ``-s_t + strength (log Z)^2`` of every token, or, linear, its negative log-likelihood.
    Both have the softmax's optimum. The squared penalty also fixes ``log Z``, at ``1 / (2 strength)``, so that scores
    can be used as log-probabilities; the linear one does not, and has no strength: any but 1 has no optimum.

    Nothing holds back the scores of the tokens that are not drawn in a step; the smaller the share, the noisier the
    gradient.

    Cost per token of a training step: ``8 D V share`` FLOPs, and ``6 D`` for the target; memory of one block of logits;
    the gradient of the table is dense.

    References: Andreas & Klein 2015, When and Why Are Log-Linear Models Self-Normalizing?, section 5 (squared); Chen,
    Grangier & Auli 2015, Strategies for Training Large Vocabulary Neural Language Models, "Infrequent Normalization"
    (linear: there called a proper estimator of likelihood). There a token is drawn with probability ``share``; here M
    is fixed, ``share`` of N, at least 1.

    Args:
        hidden_size: D.
        counts: ``[vocab]`` training frequency of each word, non-increasing.
        share: of the tokens of a call that are drawn, in (0, 1].
        penalty: ``linear`` or ``squared``, see above.
        strength: factor of the squared penalty, positive; without effect on the linear one.
        bias: whether words have a bias.
        backend: what computes the log-partition and its gradients; ``auto`` takes the fastest that can run on the
            device.

    Raises:
        ValueError: ``share`` or ``strength`` is out of range, ``penalty`` unknown; ``backend`` cannot run here.
    """

    backends = BACKENDS

    def __init__(
        self,
        hidden_size: int,
        counts: Tensor,
        *,
        share: float = 0.1,
        penalty: Literal["linear", "squared"] = "squared",
        strength: float = 1.0,
        bias: bool = True,
        backend: Literal["auto", "eager", "cpp", "triton"] = "auto",
    ) -> None:
        super().__init__(hidden_size, counts, bias=bias, backend=backend)
        if not 0 < share <= 1:
            raise ValueError(f"share={share}: must be in (0, 1], the share of the tokens to normalise")
        if penalty not in ("linear", "squared"):
            raise ValueError(f"penalty={penalty!r}: must be linear or squared")
        if not (math.isfinite(strength) and strength > 0):
            raise ValueError(f"strength={strength}: must be a positive finite number")
        self.share = share
        self.penalty = penalty
        self.strength = strength

    def draw(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
    ) -> Selection:
        """Draw the tokens whose normaliser is computed."""
        tokens = len(target)
        selected = min(tokens, max(1, round(self.share * tokens)))
        order = torch.randperm(tokens, generator=self.generator(hidden.device), device=hidden.device)
        return Selection(order[:selected])

    def forward(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Selection | None = None,
    ) -> Float[Tensor, "tokens"]:
        """Return the negative score of each target, with the penalty where the token was drawn."""
        drawn = self.draw(hidden, target, previous) if sample is None else sample
        score = upcast(hidden * F.embedding(target, self.weight)).sum(1)
        if self.bias is not None:
            score = score + self.bias[target]
        if not len(drawn.tokens):
            return -score
        nll, log_partition = linear_cross_entropy_and_logsumexp(
            hidden[drawn.tokens], self.weight, self.bias, target[drawn.tokens], backend=self.backend
        )
        scale = len(target) / len(drawn.tokens)
        # -s_t as nll - log Z: where the two nearly cancel (all tokens drawn, a confident model), nll keeps its digits
        if self.penalty == "linear":
            objective = nll + (scale - 1) * log_partition
        else:
            objective = nll + (scale * self.strength * log_partition.square() - log_partition)
        return (-score).index_copy(0, drawn.tokens, objective)
