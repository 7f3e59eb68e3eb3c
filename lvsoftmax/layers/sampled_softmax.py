"""Softmax over the target and a few words drawn from a noise distribution."""

from jaxtyping import Float, Int
from torch import Tensor

from lvsoftmax.layer import DenseOutputLayer
from lvsoftmax.noise import NoiseName, make_noise
from lvsoftmax.ops.linear_cross_entropy.sampled import candidate_loss, sampled_softmax_slopes
from lvsoftmax.ops.noise import Sample, log_inclusion, sample_count
from lvsoftmax.ops.objectives import candidate_logits, sampled_softmax


class SampledSoftmax(DenseOutputLayer):
    """Trains a softmax on the target and K drawn words, shared by the tokens of a call; evaluates the exact one.

    With logits ``s``, drawn words ``S`` and ``l_w`` the log of how often word ``w`` is expected among the draws::

        objective = -log( exp(s_t - l_t) / (exp(s_t - l_t) + sum_{k in S, k != t} exp(s_k - l_k)) )

    The correction ``l`` undoes what the noise prefers: the optimum is ``s = log p``, for any noise and nearly for any K
    (exactly so were the words drawn independently of one another; a fixed K makes them weakly dependent). Draws that
    hit the token's own target are left out. With all words drawn this is the exact softmax.

    - Without replacement ``exp(l)`` is a word's inclusion probability, exact by systematic sampling; words that the
      noise expects once or more are always there. Drawing costs O(V), about 5 ms per 100,000 words on one CPU core.
    - With replacement ``exp(l_k) = K q_k`` for each drawn copy, while the target's is ``1 - (1 - q_t)^K``, how likely
      it is to be drawn at all. (With ``K q_t`` for the target too, as in TensorFlow's ``sampled_softmax_loss`` with
      ``unique=False``, a target expected more than once loses its own share of the sum.) Drawing costs O(K).

    Cost per token of a training step: ``6 D K`` FLOPs; memory O(N K); ``N + K`` rows of the table get gradients.

    References: Bengio & Senecal 2008, Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic
    Language Model; Jean, Cho, Memisevic & Bengio 2015, On Using Very Large Target Vocabulary for Neural Machine
    Translation, section 3 (there the target is one of the sample and ``l = log q``).

    Args:
        hidden_size: D.
        counts: ``[vocab]`` training frequency of each word, non-increasing.
        samples: K, as a number of words (int) or a share of the vocabulary (float in (0, 1], rounded up).
        noise: ``uniform``, ``log_uniform`` (about Zipf's law in the ranks) or ``unigram`` (the counts, at least one).
        power: exponent of the noise's weights; 0 makes any of them uniform.
        replacement: draw with replacement.
        bias: whether words have a bias.
        sparse: row-sparse gradients of the table and the bias.

    Raises:
        ValueError: ``samples`` is out of range, or exceeds the vocabulary without replacement; ``power`` is negative.
    """

    def __init__(
        self,
        hidden_size: int,
        counts: Tensor,
        *,
        samples: int | float = 0.05,
        noise: NoiseName = "unigram",
        power: float = 1.0,
        replacement: bool = False,
        bias: bool = True,
        sparse: bool = True,
    ) -> None:
        super().__init__(hidden_size, counts, bias=bias, sparse=sparse)
        self.samples = sample_count("samples", samples, self.vocab_size)
        self.replacement = replacement
        self.noise = make_noise(noise, counts, self.samples, power=power, replacement=replacement)

    def draw(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
    ) -> Sample:
        """Draw K words; ``target_log_expected`` is the log probability that a target is among them."""
        sample = super().draw(hidden, target, previous)
        assert sample is not None
        if self.replacement:
            return sample._replace(target_log_expected=log_inclusion(sample.target_log_expected, self.samples))
        return sample

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
