"""Softmax over the target and a few words drawn from a noise distribution."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lvsoftmax.layer import DenseOutputLayer
from lvsoftmax.noise import NoiseName, make_noise, number_of_samples, with_targets_included
from lvsoftmax.ops.linear_cross_entropy.sampled import candidate_loss, sampled_softmax_slopes
from lvsoftmax.ops.noise import Sample
from lvsoftmax.ops.objectives import candidate_logits, sampled_softmax


class SampledSoftmax(DenseOutputLayer):
    """Trains a softmax on the target and K drawn words; evaluates the exact one.

    With logits ``s``, drawn words ``S`` and ``l_w`` the log of how often word ``w`` is expected among the draws::

        objective = -log( exp(s_t - l_t) / (exp(s_t - l_t) + sum_{k in S, k != t} exp(s_k - l_k)) )

    The correction ``l`` undoes what the noise prefers: the optimum is ``s = log p``, for any noise and nearly for any K
    (exactly so were the words drawn independently of one another; a fixed K makes them weakly dependent). Draws that
    hit the token's own target are left out. With all words drawn this is the exact softmax.

    - Without replacement ``exp(l)`` is a word's inclusion probability, exact by Deville's systematic sampling; words
      that the noise expects once or more are always there. Drawing costs O(K log V).
    - With replacement ``exp(l_k) = K q_k`` for each drawn copy, while the target's is ``1 - (1 - q_t)^K``, how likely
      it is to be drawn at all. (With ``K q_t`` for the target too, as in TensorFlow's ``sampled_softmax_loss`` with
      ``unique=False``, a target expected more than once loses its own share of the sum.) Drawing costs O(K).

    The target is in the sum whether it was drawn or not. ``positive=sampled`` treats it as one of the draws, as above.
    ``positive=corrected`` sets ``l_t = 0``: the target's term is exact, and the draws estimate the sum over the other
    words, ``E sum_{k != t} exp(s_k) / (K q_k) = sum_{w != t} exp(s_w)``. The gradient is that of Khrylchenko et al.
    2025: the target against the draws alone, ``-s_t + log sum_{k != t} exp(s_k - l_k)``, weighted by ``1 - p_t`` as
    estimated. It is unbiased up to the self-normalisation, which leaves the optimum off by O(1 / K), where
    ``sampled`` leaves it nearly right; in return its value estimates the negative log-likelihood. Divergence from the
    truth on a toy of 97 words at K = 24, as a share of the unigram's, KL bound: 0.05; positive=corrected: 0.05, which
    noise that misses what a context predicts (uniform, an unfit bigram) triples.

    ``uniform``, ``log_uniform`` and ``unigram`` noise is shared by the tokens of a call, and so is ``in_batch``: the
    targets of the call itself. ``bigram``, ``quadratic_kernel``, ``random_fourier`` and ``midx`` depend on the context:
    every token draws words of its own, with replacement. They need fewer samples, and each costs more: logits are
    single products instead of a matrix product. See :mod:`lvsoftmax.noise` for formulas, what a draw costs, and how
    those that follow the table are refreshed.

    Cost per token of a training step: ``6 D K`` FLOPs and the draws; memory O(N K); ``N + K`` rows of the table get
    gradients, ``N (K + 1)`` where the draws are a token's own.

    References: Bengio & Senecal 2008, Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic
    Language Model; Jean, Cho, Memisevic & Bengio 2015, On Using Very Large Target Vocabulary for Neural Machine
    Translation, section 3 (there the target is one of the sample and ``l = log q``); Khrylchenko et al. 2025,
    Correcting the LogQ Correction: Revisiting Sampled Softmax for Large-Scale Retrieval.

    Args:
        hidden_size: D.
        counts: ``[vocab]`` training frequency of each word, non-increasing.
        samples: K, as a number of words (int) or a share of the vocabulary (float in (0, 1], rounded up); None takes
            5 % of the vocabulary where tokens share the draws, 0.5 % where each draws its own, at a higher price.
        noise: what words are drawn from, see above; ``log_uniform`` is about Zipf's law in the ranks, ``unigram`` the
            counts, at least one.
        power: exponent of the weights of a fixed distribution, or of the unigram that ``bigram`` backs off to; 0 makes
            them uniform.
        replacement: draw with replacement; None: only where the noise offers nothing else.
        bigrams: what ``noise=bigram`` needs: rows of previous word, word and count, or the path of an .npy file of
            them; in a configuration, ``text`` for those of the training text.
        positive: how the target's own term is corrected, see above.
        bias: whether words have a bias.
        sparse: row-sparse gradients of the table and the bias.

    Raises:
        ValueError: ``samples`` is out of range, or exceeds the vocabulary without replacement; ``power`` is negative;
            the noise cannot be had with the other options; or ``bigram`` noise lacks a usable ``bigrams`` table, or a
            call the word before.
    """

    def __init__(
        self,
        hidden_size: int,
        counts: Tensor,
        *,
        samples: int | float | None = None,
        noise: NoiseName = "unigram",
        power: float = 1.0,
        replacement: bool | None = None,
        bigrams: Tensor | str | None = None,
        positive: Literal["sampled", "corrected"] = "sampled",
        bias: bool = True,
        sparse: bool = True,
    ) -> None:
        super().__init__(hidden_size, counts, bias=bias, sparse=sparse)
        self.samples = number_of_samples("samples", samples, noise, self.vocab_size)
        if positive not in ("sampled", "corrected"):
            raise ValueError(f"positive={positive!r}: must be sampled or corrected")
        self.positive = positive
        self.noise = make_noise(
            noise,
            counts,
            self.samples,
            hidden_size=hidden_size,
            power=power,
            replacement=replacement,
            bigrams=bigrams,
        )

    def draw(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
    ) -> Sample:
        """Draw words; ``target_log_expected`` is what comes off the target's logit."""
        sample = super().draw(hidden, target, previous)
        assert sample is not None and self.noise is not None
        if self.positive == "corrected":
            return sample._replace(target_log_expected=torch.zeros_like(sample.target_log_expected))
        return with_targets_included(sample, self.noise)

    def forward(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Sample | None = None,
    ) -> Float[Tensor, "tokens"]:
        """Return the cross-entropy among the target and the drawn words."""
        ids, log_expected, target_log_expected = self.draw(hidden, target, previous) if sample is None else sample
        target_logit, logit = candidate_logits(hidden, self.weight, self.bias, target, ids, sparse=self.sparse)
        return sampled_softmax(target_logit, logit, target_log_expected, log_expected, target[:, None] == ids)

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
        table = (self.weight, self.bias)
        return candidate_loss(
            sampled_softmax_slopes, hidden, *table, target, sample, weight, hits=False, sparse=self.sparse
        )
