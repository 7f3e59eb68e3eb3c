"""Logistic decisions between words of the text and drawn ones, from which a normalised model results."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lvsoftmax.layer import DenseOutputLayer
from lvsoftmax.noise import Noise, NoiseName, make_noise, number_of_samples
from lvsoftmax.ops.linear_cross_entropy.sampled import candidate_loss, noise_contrastive_slopes
from lvsoftmax.ops.noise import Sample
from lvsoftmax.ops.objectives import candidate_logits, leave_out, left_out_draws, noise_contrastive


class NoiseContrastiveEstimation(DenseOutputLayer):
    """Trains word by word to tell the target from K drawn words, which needs no normaliser; evaluates the softmax.

    With logits ``s``, log-normaliser ``c`` and words drawn from ``q``::

        u_w = s_w - c - log(K q_w)
        objective = -log sigmoid(u_t) - sum_k log sigmoid(-u_k)

    ``sigmoid(u_w)`` is how likely ``w`` comes from the text rather than from the noise, if ``exp(s - c)`` is the
    probability it has in the text. That is where the optimum lies, ``s - c = log p``, for any noise and any K: the
    model learns to be normalised. K and the noise decide how noisy the gradient is. Without replacement ``K q`` is the
    probability that a word is among the draws, and the optimum is the same. Draws that hit the target count
    like all others; leaving them out would bias the optimum. Tokens may share the draws, which makes their logits
    a matrix product, or draw for themselves, which takes K times as much memory traffic.

    Training starts with ``c`` equal to the log-partition of an untrained layer, 0 with a bias (which starts at the log
    of the words' frequencies) and ``log V`` without; Mnih & Teh start a bias at ``-log V`` to the same end. The log
    of the partition that is left, ``log sum exp(s - c)``, is what ``log_partition`` returns: 0 where the layer has
    learned to be normalised.

    Cost per token of a training step: ``6 D K`` FLOPs; memory O(N K), of a block of tokens in ``loss`` where draws are
    shared; ``N + K`` rows of the table get gradients, ``N + N K`` where they are not.

    References: Gutmann & Hyvarinen 2010, Noise-Contrastive Estimation: A New Estimation Principle for Unnormalized
    Statistical Models; Mnih & Teh 2012, A Fast and Simple Algorithm for Training Neural Probabilistic Language Models,
    equation 8 (draws of a token's own); Zoph, Vaswani, May & Knight 2016, Simple, Fast Noise-Contrastive Estimation for
    Large RNN Vocabularies (shared draws).

    Args:
        hidden_size: D.
        counts: ``[vocab]`` training frequency of each word, non-increasing.
        samples: K, as a number of words (int) or a share of the vocabulary (float in (0, 1], rounded up); None takes
            5 % of the vocabulary where tokens share the draws, 0.5 % where each draws its own, at a higher price.
        noise: what words are drawn from, see :mod:`lvsoftmax.noise`: ``uniform``, ``log_uniform`` (about Zipf's law in
            the ranks), ``unigram`` (the counts, at least one), ``in_batch`` (the other tokens' targets, always shared),
            or one that depends on the context and is always a token's own.
        power: exponent of the weights of a fixed distribution, or of the unigram that ``bigram`` backs off to; 0 makes
            them uniform.
        replacement: draw with replacement, as all but the fixed distributions must.
        noise_sharing: ``batch``, the tokens of a call share K words of a fixed distribution, or ``token``, each draws K
            words of its own.
        bigrams: what ``noise=bigram`` needs: rows of previous word, word and count, or the path of an .npy file of
            them; in a configuration, ``text`` for those of the training text.
        normaliser: ``fixed`` keeps ``c`` at its start; ``learned`` trains it, one number for all contexts.
        bias: whether words have a bias.
        sparse: row-sparse gradients of the table and the bias.

    Raises:
        ValueError: ``samples`` is out of range, or exceeds the vocabulary without replacement; ``power`` is negative;
            the noise cannot be had with the other options; or ``bigram`` noise lacks a usable ``bigrams`` table, or a
            call the word before.
    """

    log_normaliser: Tensor

    def __init__(
        self,
        hidden_size: int,
        counts: Tensor,
        *,
        samples: int | float | None = None,
        noise: NoiseName = "unigram",
        power: float = 1.0,
        replacement: bool = True,
        noise_sharing: Literal["batch", "token"] = "batch",
        bigrams: Tensor | str | None = None,
        normaliser: Literal["fixed", "learned"] = "fixed",
        bias: bool = True,
        sparse: bool = True,
    ) -> None:
        super().__init__(hidden_size, counts, bias=bias, sparse=sparse)
        if noise_sharing not in ("batch", "token"):
            raise ValueError(f"noise_sharing={noise_sharing!r}: must be batch or token")
        per_token = noise_sharing == "token"
        self.samples = number_of_samples("samples", samples, noise, self.vocab_size, per_token=per_token)
        self.noise: Noise = make_noise(
            noise,
            counts,
            self.samples,
            hidden_size=hidden_size,
            power=power,
            replacement=replacement,
            per_token=per_token,
            bigrams=bigrams,
        )
        # [1]: a number without dimension would leave its sum with the draws' float32 in float32.
        start = torch.tensor([0.0 if bias else math.log(self.vocab_size)])
        if normaliser == "learned":
            self.log_normaliser = nn.Parameter(start)
        elif normaliser == "fixed":
            self.register_buffer("log_normaliser", start)
        else:
            raise ValueError(f"normaliser={normaliser!r}: must be fixed or learned")

    def log_partition(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens"]:
        """Return ``log sum exp(s - c)``."""
        log_partition = super().log_partition(hidden)
        assert log_partition is not None
        return log_partition - self.log_normaliser

    def log_prob_and_partition(
        self, hidden: Float[Tensor, "tokens hidden"]
    ) -> tuple[Float[Tensor, "tokens vocab"], Float[Tensor, "tokens"]]:
        """Return both from one product."""
        log_prob, log_partition = super().log_prob_and_partition(hidden)
        assert log_partition is not None
        return log_prob, log_partition - self.log_normaliser

    def forward(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Sample | None = None,
    ) -> Float[Tensor, "tokens"]:
        """Return the binary cross-entropies of the target and the drawn words, summed."""
        ids, log_expected, target_log_expected = self._sample(hidden, target, previous, sample)
        target_logit, logit = candidate_logits(hidden, self.weight, self.bias, target, ids, sparse=self.sparse)
        own = left_out_draws(target, ids, hits=True, own=self.noise.holds_targets)
        return noise_contrastive(target_logit - target_log_expected, leave_out(logit - log_expected, own))

    def loss(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        weight: Float[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Sample | None = None,
    ) -> Float[Tensor, ""]:
        """Return ``sum(weight * forward)``, its gradients computed on the way, without ``[tokens, samples]``."""
        sample = self._sample(hidden, target, previous, sample)
        table = (self.weight, self.bias)
        return candidate_loss(
            noise_contrastive_slopes,
            hidden,
            *table,
            target,
            sample,
            weight,
            hits=True,
            own=self.noise.holds_targets,
            sparse=self.sparse,
        )

    def _sample(self, hidden: Tensor, target: Tensor, previous: Tensor | None, sample: Sample | None) -> Sample:
        """The draws, with the log-normaliser added to what comes off their logits."""
        sample = self.draw(hidden, target, previous) if sample is None else sample
        assert sample is not None
        return sample._replace(
            log_expected=sample.log_expected + self.log_normaliser,
            target_log_expected=sample.target_log_expected + self.log_normaliser,
        )
