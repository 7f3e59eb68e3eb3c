"""A softmax over the target and drawn words that also learns what the drawn words are not."""

from typing import get_args

from jaxtyping import Float, Int
from torch import Tensor

from lvsoftmax.layer import DenseOutputLayer
from lvsoftmax.noise import NoiseName, make_noise, number_of_samples, with_targets_included
from lvsoftmax.ops.linear_cross_entropy.sampled import black_out_slopes, candidate_loss
from lvsoftmax.ops.noise import FixedNoiseName, Sample
from lvsoftmax.ops.objectives import black_out, candidate_logits


class BlackOut(DenseOutputLayer):
    """Trains a softmax on the target and K drawn words to be right about every one of them; evaluates the exact one.

    With logits ``s``, words ``S`` drawn from ``q``, and ``l_w`` the log of how often a word is expected among them::

        p_w = exp(s_w - l_w) / (exp(s_t - l_t) + sum_{k in S, k != t} exp(s_k - l_k))
        objective = -log p_t - sum_{k in S, k != t} log(1 - p_k)

    The first term is sampled softmax, the second pushes down whatever drawn word is taken for likely. The noise is a
    power of the unigram distribution, between uniform (``power=0``) and the unigram itself (1). Draws that hit the
    token's own target are left out. ``l`` is ``log(K q)`` for draws with replacement, and the log probability to be
    among the draws for those without it and for the target.

    With all words drawn without replacement the optimum is ``s = log p``; with fewer it is off by O(1/K). Divergence
    from the truth on a toy of 97 words at K = 24, as a share of the unigram's, KL bound: 0.05.

    Cost per token of a training step: ``6 D K`` FLOPs; memory O(N K), of a block of tokens in ``loss``; ``N + K`` rows
    of the table get gradients.

    Reference: Ji, Vishwanathan, Satish, Anderson & Dubey 2016, BlackOut: Speeding up Recurrent Neural Network Language
    Models With Very Large Vocabularies, equations 5 and 6. There ``l = log q``, which is the same thing (the factor K
    cancels) unless a target is expected more than once.

    Args:
        hidden_size: D.
        counts: ``[vocab]`` training frequency of each word, non-increasing.
        samples: K, as a number of words (int) or a share of the vocabulary (float in (0, 1], rounded up); None takes
            5 % of the vocabulary where tokens share the draws, 0.5 % where each draws its own, at a higher price.
        noise: what words are drawn from, see :mod:`lvsoftmax.noise`; ``log_uniform`` is about Zipf's law in the ranks,
            ``unigram`` the counts, at least one. Those that depend on the context draw words for each token.
        power: the paper's alpha: exponent of the weights of a fixed distribution, or of the unigram that ``bigram``
            backs off to. None: 0.4 for a fixed one, as in the paper, 1 for others.
        replacement: draw with replacement; None: only where the noise offers nothing else.
        bigrams: what ``noise=bigram`` needs: rows of previous word, word and count, or the path of an .npy file of
            them; in a configuration, ``text`` for those of the training text.
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
        power: float | None = None,
        replacement: bool | None = None,
        bigrams: Tensor | str | None = None,
        bias: bool = True,
        sparse: bool = True,
    ) -> None:
        super().__init__(hidden_size, counts, bias=bias, sparse=sparse)
        self.samples = number_of_samples("samples", samples, noise, self.vocab_size)
        if power is None:
            power = 0.4 if noise in get_args(FixedNoiseName) else 1.0
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
        """Draw words; ``target_log_expected`` is the log probability that a target is among them."""
        sample = super().draw(hidden, target, previous)
        assert sample is not None and self.noise is not None
        return with_targets_included(sample, self.noise)

    def forward(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Sample | None = None,
    ) -> Float[Tensor, "tokens"]:
        """Return the discriminative loss among the target and the drawn words."""
        sample = self.draw(hidden, target, previous) if sample is None else sample
        ids, log_expected, target_log_expected = sample
        target_logit, logit = candidate_logits(hidden, self.weight, self.bias, target, ids, sparse=self.sparse)
        return black_out(target_logit, logit, target_log_expected, log_expected, target[:, None] == ids)

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
        return candidate_loss(black_out_slopes, hidden, *table, target, sample, weight, hits=False, sparse=self.sparse)
