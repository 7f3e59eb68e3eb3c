"""A softmax over the words that occur in a stretch of text."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lvsoftmax.layer import DenseOutputLayer
from lvsoftmax.noise import make_fixed_noise
from lvsoftmax.ops.inputs import check_vocabulary
from lvsoftmax.ops.linear_cross_entropy.sampled import candidate_loss, sampled_softmax_slopes
from lvsoftmax.ops.noise import FixedNoiseName, Sample, fill_up, sample_count
from lvsoftmax.ops.objectives import candidate_logits, sampled_softmax


class TargetSampling(DenseOutputLayer):
    """Trains a softmax on the words of a stretch of text, filled up with drawn ones; evaluates the exact softmax.

    The candidates ``C`` are the targets of the stretch that ``observe`` has announced (of a call alone, before that),
    and as many other words, drawn without replacement, as bring them to K. With logits ``s``::

        objective = -log( exp(s_t) / sum_{w in C} exp(s_w) )

    There is no correction: the proposal that the sum stands for is uniform over the candidates of a stretch, so that it
    is the same for all of them and cancels (Jean et al.). But words differ in how often they are candidates at all.
    With ``r_w`` the share of the stretches that have ``w`` among their candidates, the optimum is about
    ``s = log p - log r``: what is always there is right, and rare words are overestimated, the more so the shorter the
    stretches and the smaller K. With all words as candidates this is the exact softmax. Divergence from the truth on a
    toy of 97 words at K = 24 and 256 tokens a stretch, as a share of the unigram's, KL bound: 0.1.

    Cost per token of a training step: ``6 D C`` FLOPs, where C is K or the number of different targets in the stretch,
    whichever is larger; O(V) per call to list them; memory O(N C), of a block of tokens in ``loss``; C rows of the
    table get gradients, most of them the same ones throughout a stretch.

    References: Jean, Cho, Memisevic & Bengio 2015, On Using Very Large Target Vocabulary for Neural Machine
    Translation, section 3.1 (there a stretch is as long as K different targets allow); Chen, Grangier & Auli 2015,
    Strategies for Training Large Vocabulary Neural Language Models, "Target Sampling" (filled up).

    Args:
        hidden_size: D.
        counts: ``[vocab]`` training frequency of each word, non-increasing.
        samples: K, as a number of words (int) or a share of the vocabulary (float in (0, 1], rounded up).
        noise: what the other words are drawn from: ``uniform``, ``log_uniform`` (about Zipf's law in the ranks) or
            ``unigram`` (the counts, at least one).
        power: exponent of the noise's weights; 0 makes any of them uniform.
        bias: whether words have a bias.
        sparse: row-sparse gradients of the table and the bias.

    Raises:
        ValueError: ``samples`` is out of range or exceeds the vocabulary; ``power`` is negative.
    """

    announced: Tensor

    def __init__(
        self,
        hidden_size: int,
        counts: Tensor,
        *,
        samples: int | float = 0.05,
        noise: FixedNoiseName = "uniform",
        power: float = 1.0,
        bias: bool = True,
        sparse: bool = True,
    ) -> None:
        super().__init__(hidden_size, counts, bias=bias, sparse=sparse)
        self.samples = sample_count("samples", samples, self.vocab_size)
        self.noise = make_fixed_noise(noise, counts, self.samples, power=power, replacement=False)
        self.register_buffer("announced", torch.zeros(self.vocab_size, dtype=torch.bool))

    def observe(self, target: Int[Tensor, "..."]) -> None:
        """Take a stretch's targets for the candidates of the calls to come."""
        check_vocabulary("target", target, self.vocab_size)
        self.announced.zero_()[target.flatten()] = True

    def draw(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
    ) -> Sample:
        """Return the candidates, each once, in the order of their ids; on CUDA one synchronisation for their number."""
        drawn = super().draw(hidden, target, previous)
        assert drawn is not None
        order = torch.randperm(self.samples, generator=self.generator(hidden.device), device=hidden.device)
        member = self.announced.index_fill(0, target, True)
        ids = fill_up(member, drawn.ids[order])
        return Sample(ids, drawn.log_expected.new_zeros(len(ids)), drawn.log_expected.new_zeros(len(target)))

    def forward(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Sample | None = None,
    ) -> Float[Tensor, "tokens"]:
        """Return the cross-entropy among the candidates."""
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
        """Return ``sum(weight * forward)``, its gradients computed on the way, without ``[tokens, candidates]``."""
        sample = self.draw(hidden, target, previous) if sample is None else sample
        table = (self.weight, self.bias)
        return candidate_loss(
            sampled_softmax_slopes, hidden, *table, target, sample, weight, hits=False, sparse=self.sparse
        )
