"""A mixture of softmaxes: several experts over one table, weighted by the context."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lvsoftmax.layer import OutputLayer, unigram_log_prob
from lvsoftmax.ops.linear_cross_entropy import BACKENDS
from lvsoftmax.ops.mixture_nll import mixture_log_prob, mixture_nll, mixture_nll_loss
from lvsoftmax.ops.noise import Sample
from lvsoftmax.ops.numerics import upcast
from lvsoftmax.ops.softmax import log_softmax


class MixtureOfSoftmaxes(OutputLayer):
    """E softmaxes over one table: ``p(w | h) = sum over e of pi_e p_e(w)``, weighted by ``pi = softmax(P h)``.

    Expert e is ``p_e(w) = softmax over v of (w_v . x_e + b_v)`` at w, with ``x_e = tanh(U_e h + c_e)``. One softmax
    over vectors of width D represents log-probabilities of rank ``D + 2`` at most, for all contexts together (two of it
    are for biases and the normaliser); a mixture is not bound to any rank.

    Weights start uniform in plus or minus one over the root of the width they read, ``c`` at zero, the bias at the
    unigram distribution. The experts' vectors are an order of magnitude longer than the hidden vectors of a young
    model, so steps that do not shrink with the gradient (Adagrad, Adam) want a fifth of a full softmax's rate here.

    Cost per token: ``6 E (d V + D d)`` FLOPs for a training step with vectors of width d, E times a full softmax of
    that width; ``2 E (d V + D d)`` for evaluation. Memory of one block of logits.

    Reference: Yang, Dai, Salakhutdinov & Cohen 2018, Breaking the Softmax Bottleneck: A High-Rank RNN Language Model,
    section 2.4 (d their embedding size, 15 experts on Penn Treebank and WikiText-2; there words have no biases in the
    equation, but in the software).

    Args:
        hidden_size: D.
        counts: ``[vocab]`` training frequency of each word, non-increasing.
        experts: E.
        width: d as a share of D, rounded.
        backend: what computes loss and gradients; ``auto`` takes the fastest that can run on the device.

    Raises:
        ValueError: ``experts`` is below 1, ``width`` is not positive or leaves no width, or ``backend`` cannot run
            here.
    """

    backends = BACKENDS

    def __init__(
        self,
        hidden_size: int,
        counts: Tensor,
        *,
        experts: int = 4,
        width: float = 1.0,
        backend: Literal["auto", "eager", "cpp", "triton"] = "auto",
    ) -> None:
        super().__init__(hidden_size, counts, backend=backend)
        if experts < 1:
            raise ValueError(f"experts={experts}: a mixture needs at least 1")
        if not (math.isfinite(width) and round(width * hidden_size) >= 1):
            raise ValueError(f"width={width}: must be a share of hidden_size={hidden_size} that leaves at least 1")
        self.experts = experts
        self.width = round(width * hidden_size)
        self.prior_weight = nn.Parameter(torch.empty(experts, hidden_size))
        self.latent_weight = nn.Parameter(torch.empty(experts * self.width, hidden_size))
        self.latent_bias = nn.Parameter(torch.zeros(experts * self.width))
        self.weight = nn.Parameter(torch.empty(self.vocab_size, self.width))
        self.bias = nn.Parameter(unigram_log_prob(counts))
        for weight in (self.prior_weight, self.latent_weight, self.weight):
            nn.init.uniform_(weight, -1 / math.sqrt(weight.shape[1]), 1 / math.sqrt(weight.shape[1]))

    def mixture(
        self, hidden: Float[Tensor, "tokens hidden"]
    ) -> tuple[Float[Tensor, "tokens experts"], Float[Tensor, "tokens experts width"]]:
        """Return each token's prior logits and the vectors of its experts."""
        latent = torch.tanh(upcast(F.linear(hidden, self.latent_weight, self.latent_bias)))
        return upcast(F.linear(hidden, self.prior_weight)), latent.unflatten(1, (self.experts, self.width))

    def log_prob(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        """Add up the experts, one after the other."""
        prior, latent = self.mixture(hidden)
        return mixture_log_prob(log_softmax(prior, dim=1), latent, self.weight, self.bias)

    def nll(self, hidden: Float[Tensor, "tokens hidden"], target: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
        """Return the exact negative log-likelihood, by blocks of tokens."""
        return mixture_nll(*self.mixture(hidden), self.weight, self.bias, target, backend=self.backend)

    def loss(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        weight: Float[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Sample | None = None,
    ) -> Float[Tensor, ""]:
        """Return ``sum(weight * nll)``, by blocks of tokens."""
        operands = *self.mixture(hidden), self.weight, self.bias, target, weight
        return mixture_nll_loss(*operands, backend=self.backend)

    def embed(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... hidden"]:
        """Look ``ids`` up in the table, if it is as wide as the hidden vectors.

        Raises:
            ValueError: it is not.
        """
        if self.width != self.hidden_size:
            raise ValueError(f"width={self.width} is not hidden_size={self.hidden_size}; to tie, set output.width=1.0")
        return F.embedding(ids, self.weight)
