"""The law of learning: every output layer, trained, comes to the distribution that its text was drawn from."""

import math
import re

import pytest
import torch
from cases import WITH_FULL_SUPPORT, WITH_PARTIAL_SUPPORT, Batch, Case, dense, zipf_counts

from lvsoftmax.layer import OutputLayer
from lvsoftmax.ops.noise import Sample


class Toy:
    """A joint distribution of contexts and words: the words' marginal is Zipf's, their information on the context
    about half a nat. The counts given to the layers, and so every noise that follows them, are flatter than it."""

    contexts, words, hidden_size = 4, 97, 32

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        marginal = 1 / torch.arange(1, self.words + 1, dtype=torch.float64)
        affinity = torch.randn(self.words, self.contexts, generator=generator, dtype=torch.float64)
        self.joint = ((marginal / marginal.sum())[:, None] * (2 * affinity).softmax(1)).T  # [contexts, words]
        self.context = self.joint.sum(1, keepdim=True)
        self.conditional = self.joint / self.context
        self.counts = zipf_counts(self.words, 0.5)

    def divergence(self, log_prob: torch.Tensor) -> float:
        """Expected KL(true || model) over contexts, from the model's log-probabilities [contexts, words]."""
        return (self.joint * (self.conditional.log() - log_prob.double())).sum().item()

    def unigram_divergence(self) -> float:
        return self.divergence(self.joint.sum(0).log().expand(self.contexts, -1))

    def distance(self, log_prob: torch.Tensor) -> float:
        """Expected total variation between the true distribution and the model's, from the model's logarithms."""
        return (self.context * (self.conditional - log_prob.double().exp()).abs()).sum().item() / 2

    def train(self, layer: OutputLayer, steps: int = 600, size: int = 256) -> float:
        """Train as ``learn`` does; return the divergence at the end."""
        return self.divergence(self.learn(layer, steps, size))

    def learn(self, layer: OutputLayer, steps: int = 600, size: int = 256) -> torch.Tensor:
        """Train on pairs drawn from the joint distribution; return the log-probabilities [contexts, words]."""
        generator = torch.Generator().manual_seed(6)
        table = torch.randn(self.contexts, self.hidden_size, generator=generator).requires_grad_()
        optimiser = torch.optim.Adam([table, *layer.parameters()], lr=0.03, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: math.cos(math.pi / 2 * step / steps))
        pairs = self.joint.flatten().multinomial(steps * size, replacement=True, generator=generator)
        for pair in pairs.view(steps, size):
            context, target = pair // self.words, pair % self.words
            layer.observe(target)
            layer.refresh()
            optimiser.zero_grad()
            layer.loss(table[context], target, torch.full((size,), 1 / size), context).backward()
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            return layer.log_prob(table)


def allowed_divergence(case: Case) -> float:
    """Share of the unigram's divergence, else that of a consistent layer.

    The class's docstring states it: "KL bound: x", or "KL bound: x; option=value: y; ..." where values differ.
    """
    stated = re.search(r"KL bound: (\d*\.?\d+)((?:;\s+\w+=\w+:\s+\d*\.?\d+)*)", case.layer_class.__doc__ or "")
    if not stated:
        return 0.05
    by_value = dict(re.findall(r"(\w+=\w+):\s+(\d*\.?\d+)", stated[2]))
    return float(by_value.get(f"{case.option}={case.value}", stated[1]))


def corrects(case: Case) -> bool:
    """Whether the layer's objective depends on how often the words it draws are expected."""
    layer = case.build()
    batch = Batch.of(layer, dtype=torch.float32)
    sample = batch.draw(layer)
    if not isinstance(sample, Sample):
        return False
    uncorrected = layer(batch.hidden, batch.target, batch.previous, sample.uncorrected())
    return not torch.equal(uncorrected, layer(batch.hidden, batch.target, batch.previous, sample))


LEARNERS = [case for case in WITH_FULL_SUPPORT if case.option != "sparse"]


@pytest.mark.parametrize("case", LEARNERS, ids=str)
@pytest.mark.usefixtures("without_type_checks")
def test_training_reaches_the_true_distribution(case):
    case.skip_if_interpreted()
    toy = Toy()
    layer = case.build(hidden_size=toy.hidden_size, counts=toy.counts, **dense(case))
    assert toy.train(layer) <= allowed_divergence(case) * toy.unigram_divergence()


@pytest.mark.parametrize("case", [case for case in WITH_PARTIAL_SUPPORT if case.option != "sparse"], ids=str)
@pytest.mark.usefixtures("without_type_checks")
def test_training_comes_as_near_to_the_true_distribution_as_the_law_above_has_others_come(case):
    """The divergence is infinite where a word of the text has probability zero; the total variation is not, and
    ``sqrt(KL / 2)`` bounds it for those that obey the law above: Pinsker's inequality."""
    toy = Toy()
    layer = case.build(hidden_size=toy.hidden_size, counts=toy.counts, **dense(case))
    allowed = math.sqrt(allowed_divergence(case) * toy.unigram_divergence() / 2)
    unigram = toy.distance(toy.joint.sum(0).log().expand(toy.contexts, -1))
    assert allowed < unigram / 2
    assert toy.distance(toy.learn(layer)) <= allowed


@pytest.mark.parametrize("factor", [0.0, -1.0], ids=["dropped", "negated"])
@pytest.mark.parametrize("case", [c for c in LEARNERS if corrects(c)], ids=str)
@pytest.mark.usefixtures("without_type_checks")
def test_training_with_a_wrong_correction_does_not(case, factor, monkeypatch):
    """The toy can tell: were it blind to the correction of the draws, the law above would prove little."""
    toy = Toy()
    layer = case.build(hidden_size=toy.hidden_size, counts=toy.counts, **dense(case))
    draw = layer.draw

    def wrong(*arguments):
        sample = draw(*arguments)
        if sample.log_expected.std() < 1e-6:
            pytest.skip("every word is expected equally often: nothing to correct")
        return sample._replace(
            log_expected=factor * sample.log_expected, target_log_expected=factor * sample.target_log_expected
        )

    monkeypatch.setattr(layer, "draw", wrong)
    assert not toy.train(layer) <= allowed_divergence(case) * toy.unigram_divergence()
