"""Logistic decisions between words of the text and drawn ones by plain scores, corrected where it is evaluated."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lvsoftmax.layer import DenseOutputLayer
from lvsoftmax.noise import make_fixed_noise, number_of_samples
from lvsoftmax.ops.linear_cross_entropy import linear_cross_entropy
from lvsoftmax.ops.linear_cross_entropy.sampled import candidate_loss, noise_contrastive_slopes
from lvsoftmax.ops.noise import FixedNoiseName, Sample
from lvsoftmax.ops.objectives import candidate_logits, noise_contrastive

DIAGNOSED = 64
"""Tokens of the latest step that the diagnostics evaluate."""


class NegativeSampling(DenseOutputLayer):
    """Trains word by word to tell the target from K drawn words by plain scores; evaluates what these scores mean.

    With scores ``s_w = h . w + b_w`` and words drawn from ``q``::

        objective = -log sigmoid(s_t) - sum_k log sigmoid(-s_k)

    This is noise-contrastive estimation with nothing taken off the scores. Its optimum is therefore not ``log p`` but
    ``s = log p - log(K q)``, and the model's distribution is::

        log p(w | h) = log softmax(s + log(K q))_w

    for any noise and any K. The softmax of the scores alone, what is left when this is forgotten, prefers words that
    the noise draws rarely; the diagnostics tell how much worse it is. Without replacement ``K q`` is the probability
    that a word is among the draws. The noise is a fixed one, since ``log(K q)`` of every word is a part of the model.

    The bias starts at the log of the words' frequencies less ``log(K q)``, so that an untrained layer already predicts
    about the unigram distribution.

    Cost per token of a training step: ``6 D K`` FLOPs; memory O(N K), of a block of tokens in ``loss`` where draws are
    shared; ``N + K`` rows of the table get gradients, ``N + N K`` where they are not.

    References: Mikolov, Sutskever, Chen, Corrado & Dean 2013, Distributed Representations of Words and Phrases and
    their Compositionality, equation 4 (draws of a token's own); Levy & Goldberg 2014, Neural Word Embedding as
    Implicit Matrix Factorization, equation 7 (the optimum).

    Args:
        hidden_size: D.
        counts: ``[vocab]`` training frequency of each word, non-increasing.
        samples: K, as a number of words (int) or a share of the vocabulary (float in (0, 1], rounded up); None takes
            5 % of the vocabulary where tokens share the draws, 0.5 % where each draws its own, at a higher price.
        noise: ``uniform``, ``log_uniform`` (about Zipf's law in the ranks) or ``unigram`` (the counts, at least one).
        power: exponent of the noise's weights; 0 makes any of them uniform.
        replacement: draw with replacement.
        noise_sharing: ``batch``, the tokens of a call share K words, or ``token``, each draws K words of its own.
        bias: whether words have a bias.
        sparse: row-sparse gradients of the table and the bias.

    Raises:
        ValueError: ``samples`` is out of range, or exceeds the vocabulary without replacement; ``power`` is negative.
    """

    log_expected: Tensor

    def __init__(
        self,
        hidden_size: int,
        counts: Tensor,
        *,
        samples: int | float | None = None,
        noise: FixedNoiseName = "unigram",
        power: float = 0.75,
        replacement: bool = True,
        noise_sharing: Literal["batch", "token"] = "batch",
        bias: bool = True,
        sparse: bool = True,
    ) -> None:
        super().__init__(hidden_size, counts, bias=bias, sparse=sparse)
        if noise_sharing not in ("batch", "token"):
            raise ValueError(f"noise_sharing={noise_sharing!r}: must be batch or token")
        per_token = noise_sharing == "token"
        self.samples = number_of_samples("samples", samples, noise, self.vocab_size, per_token=per_token)
        self.noise = make_fixed_noise(
            noise, counts, self.samples, power=power, replacement=replacement, per_token=per_token
        )
        log_expected = self.noise.log_expected(torch.arange(self.vocab_size))
        self.register_buffer("log_expected", log_expected.to(self.weight.dtype))
        if self.bias is not None:
            with torch.no_grad():
                self.bias -= self.log_expected
        self._latest: tuple[Tensor, Tensor] | None = None

    def operands(self, hidden: Float[Tensor, "tokens hidden"]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return hidden, table and ``b + log(K q)``: the logits of the distribution, not the scores of training."""
        return hidden, self.weight, self.log_expected if self.bias is None else self.bias + self.log_expected

    def draw(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
    ) -> Sample:
        """Draw words."""
        self._latest = hidden[:DIAGNOSED].detach().clone(), target[:DIAGNOSED].clone()
        sample = super().draw(hidden, target, previous)
        assert sample is not None
        return sample

    def forward(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Sample | None = None,
    ) -> Float[Tensor, "tokens"]:
        """Return the binary cross-entropies of the target and the drawn words, summed."""
        ids = (self.draw(hidden, target, previous) if sample is None else sample).ids
        return noise_contrastive(*candidate_logits(hidden, self.weight, self.bias, target, ids, sparse=self.sparse))

    def loss(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        weight: Float[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Sample | None = None,
    ) -> Float[Tensor, ""]:
        """Return ``sum(weight * forward)``, its gradients computed on the way, without ``[tokens, samples]``."""
        sample = (self.draw(hidden, target, previous) if sample is None else sample).uncorrected()
        table = (self.weight, self.bias)
        return candidate_loss(
            noise_contrastive_slopes, hidden, *table, target, sample, weight, hits=True, sparse=self.sparse
        )

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """Return the mean negative log-likelihood of a few latest tokens, and that of the softmax of scores alone."""
        if self._latest is None:
            return {}
        hidden, target = self._latest
        hidden = hidden.to(self.weight.dtype)  # autocast has ended
        scores = linear_cross_entropy(hidden, self.weight, self.bias, target)
        return {"nll": self.nll(hidden, target).mean().item(), "nll_of_scores": scores.mean().item()}
