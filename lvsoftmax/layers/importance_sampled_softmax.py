"""Softmax whose normaliser is estimated by importance sampling, from as many words as it takes."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lvsoftmax.layer import DenseOutputLayer
from lvsoftmax.noise import make_noise, number_of_samples
from lvsoftmax.ops.gather_dot import gather_dot
from lvsoftmax.ops.linear_cross_entropy.sampled import candidate_loss, importance_sampling_slopes
from lvsoftmax.ops.noise import Sample, sample_count
from lvsoftmax.ops.objectives import (
    candidate_logits,
    effective_sample_size,
    importance_sampling,
    log_weight_sums,
)

ImportanceNoise = Literal["unigram", "log_uniform", "bigram", "quadratic_kernel", "random_fourier", "midx"]


class ImportanceSampledSoftmax(DenseOutputLayer):
    """Estimates the log-partition of a softmax by importance sampling in training; evaluates the exact softmax.

    With logits ``s`` and K words drawn with replacement from ``q``, shared by the tokens of a call if ``q`` is fixed::

        objective = -s_t + log( (1 / K) sum_k exp(s_k) / q_k )

    Its gradient ``-ds_t + sum_k w_k ds_k / sum_k w_k`` with ``w_k = exp(s_k) / q_k`` is the self-normalised estimate of
    the exact one, with a bias of O(1/K). The target is not in the sum: the value estimates the negative
    log-likelihood, and may be negative.

    K grows by ``samples`` words at a time until the effective sample size ``(sum w)^2 / sum w^2``, mean over the
    tokens, reaches ``ess_target`` or K reaches ``max_samples``. As the model grows sharper than the noise, the
    effective size of a fixed K falls, and training comes apart: where a context predicts a word with a greater
    probability than that of its being drawn at all, nothing balances the push on its score. For the same reason uniform
    noise is not offered, nor the targets of the call, among which a token's own would be for sure. The diagnostics, K
    and its effective size, tell in time.

    At a fixed K the optimum is off by O(1/K), more where the noise misses what a context predicts. Divergence from the
    truth on a toy of 97 words at K = 24, as a share of the unigram's, KL bound: 0.15.

    Cost per token of a training step: ``6 D K`` FLOPs, and ``2 D K`` for growing; one host synchronisation per block;
    memory O(N K); ``N + K`` rows of the table get gradients, ``N (K + 1)`` where the draws are a token's own.

    References: Bengio & Senecal 2003, Quick Training of Probabilistic Neural Nets by Importance Sampling; 2008,
    Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language Model. There the
    bigram distribution adapts to the model, and the exact gradient is taken when too many draws would be needed.

    Args:
        hidden_size: D.
        counts: ``[vocab]`` training frequency of each word, non-increasing.
        samples: words drawn at a time, as a number (int) or a share of the vocabulary (float in (0, 1], rounded up);
            None takes 2 % where tokens share the draws, 0.1 % where each draws its own, at a higher price.
        ess_target: effective sample size at which drawing stops, as a number or a share of ``max_samples``; None draws
            ``samples`` words and no more.
        max_samples: words drawn at most, as a number or a share of the vocabulary; None takes 20 % where tokens share
            the draws, 0.5 % where each draws its own; unused without ``ess_target``.
        noise: ``unigram`` (the counts, at least one), ``log_uniform`` (about Zipf's law in the ranks), or one that
            depends on the context, see :mod:`lvsoftmax.noise`: ``bigram``, ``quadratic_kernel``, ``random_fourier``,
            ``midx``. Their draws are a token's own.
        power: exponent of the weights of a fixed distribution, or of the unigram that ``bigram`` backs off to.
        bigrams: what ``noise=bigram`` needs: rows of previous word, word and count, or the path of an .npy file of
            them; in a configuration, ``text`` for those of the training text.
        bias: whether words have a bias.
        sparse: row-sparse gradients of the table and the bias.

    Raises:
        ValueError: a size is out of range, ``max_samples`` below another one, or ``power`` negative; the noise cannot
            be had with the other options; or ``bigram`` noise lacks a usable ``bigrams`` table, or a call the word
            before.
    """

    def __init__(
        self,
        hidden_size: int,
        counts: Tensor,
        *,
        samples: int | float | None = None,
        ess_target: int | float | None = 0.1,
        max_samples: int | float | None = None,
        noise: ImportanceNoise = "unigram",
        power: float = 1.0,
        bigrams: Tensor | str | None = None,
        bias: bool = True,
        sparse: bool = True,
    ) -> None:
        super().__init__(hidden_size, counts, bias=bias, sparse=sparse)
        if noise not in get_args(ImportanceNoise):
            raise ValueError(f"noise={noise!r}: choose one of {', '.join(get_args(ImportanceNoise))}")
        sizes = {"samples": (samples, 0.02, 0.001), "max_samples": (max_samples, 0.2, 0.005)}
        self.samples, self.max_samples = (
            number_of_samples(name, value, noise, self.vocab_size, shared=shared, own=own)
            for name, (value, shared, own) in sizes.items()
        )
        self.ess_target = None
        if ess_target is not None:
            self.ess_target = sample_count("ess_target", ess_target, self.max_samples, of="max_samples")
        if self.ess_target is not None and not max(self.samples, self.ess_target) <= self.max_samples:
            raise ValueError(
                f"max_samples={self.max_samples}: must be at least samples={self.samples} and "
                f"ess_target={self.ess_target}, which it limits; raise it, or set ess_target=null to fix the number of "
                "samples"
            )
        most = self.samples if self.ess_target is None else self.max_samples
        self.noise = make_noise(noise, counts, most, hidden_size=hidden_size, power=power, bigrams=bigrams)
        self._latest: tuple[Tensor, Sample] | None = None

    @torch.no_grad()
    def draw(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
    ) -> Sample:
        """Draw words, block by block, until the effective sample size suffices; one host synchronisation per block."""
        sample = super().draw(hidden, target, previous)
        assert sample is not None
        if self.ess_target is not None:
            sample = sample.first(self._enough(hidden, sample, self.ess_target))
        self._latest = hidden.detach(), sample
        return sample

    def forward(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Sample | None = None,
    ) -> Float[Tensor, "tokens"]:
        """Return the estimate of the negative log-likelihood; it may be negative."""
        ids, log_expected, _ = self.draw(hidden, target, previous) if sample is None else sample
        target_logit, logit = candidate_logits(hidden, self.weight, self.bias, target, ids, sparse=self.sparse)
        return importance_sampling(target_logit, logit, log_expected)

    def loss(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        weight: Float[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Sample | None = None,
    ) -> Float[Tensor, ""]:
        """Return ``sum(weight * forward)``, its gradients computed on the way, without ``[tokens, samples]``."""
        sample = self.draw(hidden, target, previous) if sample is None else sample
        sample = sample._replace(target_log_expected=torch.zeros_like(sample.target_log_expected))
        table = (self.weight, self.bias)
        return candidate_loss(
            importance_sampling_slopes, hidden, *table, target, sample, weight, hits=True, sparse=self.sparse
        )

    def diagnostics(self) -> dict[str, float]:
        """Return K and the mean effective sample size of the latest draw, under the present table."""
        if self._latest is None:
            return {}
        hidden, sample = self._latest
        hidden = hidden.to(self.weight.dtype)  # autocast has ended
        effective = effective_sample_size(self._log_weight_sums(hidden, sample.ids, sample.log_expected)).mean()
        return {"samples": float(sample.ids.shape[-1]), "effective_sample_size": effective.item()}

    def _enough(self, hidden: Tensor, sample: Sample, ess_target: int) -> int:
        """How many of the draws, in whole blocks, bring the mean effective sample size to its target."""
        count, log_sums = 0, torch.tensor(-torch.inf, device=hidden.device)
        for ids, log_expected in zip(
            sample.ids.split(self.samples, -1), sample.log_expected.split(self.samples, -1), strict=True
        ):
            log_sums = torch.logaddexp(log_sums, self._log_weight_sums(hidden, ids, log_expected))
            count += ids.shape[-1]
            if effective_sample_size(log_sums).mean() >= ess_target:
                break
        return count

    @torch.no_grad()
    def _log_weight_sums(self, hidden: Tensor, ids: Tensor, log_expected: Tensor) -> Tensor:
        if ids.ndim == 2:
            logit = gather_dot(hidden, self.weight, self.bias, ids, sparse=self.sparse)
        else:
            logit = F.linear(hidden, self.weight[ids], None if self.bias is None else self.bias[ids])
        return log_weight_sums(logit, log_expected)
