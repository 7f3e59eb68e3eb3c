"""A bound on the softmax made of pairwise comparisons with the target."""

import functools

from jaxtyping import Float, Int
from torch import Tensor

from lvsoftmax.layer import DenseOutputLayer
from lvsoftmax.noise import NoiseName, make_noise, number_of_samples
from lvsoftmax.ops.linear_cross_entropy.sampled import candidate_loss, one_versus_each_slopes
from lvsoftmax.ops.noise import Sample
from lvsoftmax.ops.objectives import candidate_logits, one_versus_each


class OneVersusEach(DenseOutputLayer):
    """Trains by comparing the target with one word at a time, over K drawn words; evaluates the softmax.

    With logits ``s``, drawn words ``S``, and ``e_w`` how often word ``w`` is expected among the draws (``K q_w``, or
    without replacement the probability that it is among them)::

        objective = sum_{k in S, k != t} log(1 + exp(s_k - s_t)) / e_k

    Its mean over the draws is ``-sum_{w != t} log sigmoid(s_t - s_w)``, for any noise and any K, and bounds
    ``-log softmax(s)_t`` from above. Each pair of words has its optimum at the log of their odds, so that a model free
    to say anything ends at ``s = log p + constant``, as with the exact likelihood. One that is not free ends elsewhere:
    the bound weighs its errors differently. Draws that hit the target are no comparison and are left out.

    How noisy the estimate is depends on the noise: a rarely drawn word counts ``1 / e`` times. Titsias draws uniformly,
    the default here.

    Cost per token of a training step: ``6 D K`` FLOPs; memory O(N K), of a block of tokens in ``loss``; ``N + K`` rows
    of the table get gradients.

    Reference: Titsias 2016, One-vs-Each Approximation to Softmax for Scalable Estimation of Probabilities, equations 5
    (the bound) and 11 (its estimate), proposition 1 (the optimum). There each token draws for itself, uniformly
    from the words that are not its target.

    Args:
        hidden_size: D.
        counts: ``[vocab]`` training frequency of each word, non-increasing.
        samples: K, as a number of words (int) or a share of the vocabulary (float in (0, 1], rounded up); None takes
            5 % of the vocabulary where tokens share the draws, 0.5 % where each draws its own, at a higher price.
        noise: what words are drawn from, see :mod:`lvsoftmax.noise`; ``log_uniform`` is about Zipf's law in the ranks,
            ``unigram`` the counts, at least one. Those that depend on the context draw words for each token.
        power: exponent of the weights of a fixed distribution, or of the unigram that ``bigram`` backs off to.
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
        noise: NoiseName = "uniform",
        power: float = 1.0,
        replacement: bool | None = None,
        bigrams: Tensor | str | None = None,
        bias: bool = True,
        sparse: bool = True,
    ) -> None:
        super().__init__(hidden_size, counts, bias=bias, sparse=sparse)
        self.samples = number_of_samples("samples", samples, noise, self.vocab_size)
        self.noise = make_noise(
            noise,
            counts,
            self.samples,
            hidden_size=hidden_size,
            power=power,
            replacement=replacement,
            bigrams=bigrams,
        )

    def forward(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Sample | None = None,
    ) -> Float[Tensor, "tokens"]:
        """Return the estimate of the bound, one comparison per drawn word."""
        sample = self.draw(hidden, target, previous) if sample is None else sample
        assert sample is not None
        ids, log_expected, _ = sample
        target_logit, logit = candidate_logits(hidden, self.weight, self.bias, target, ids, sparse=self.sparse)
        return one_versus_each(target_logit, logit, log_expected, target[:, None] == ids)

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
        assert sample is not None
        slopes = functools.partial(one_versus_each_slopes, sample.log_expected)
        table, sample = (self.weight, self.bias), sample.uncorrected()
        return candidate_loss(slopes, hidden, *table, target, sample, weight, hits=False, sparse=self.sparse)
