import oracles
import pytest
import torch
from cases import assert_mean

from lvsoftmax.layers.target_sampling import TargetSampling
from lvsoftmax.ops import noise as ops

COUNTS = torch.tensor([900, 400, 300, 200, 100, 50, 30, 20, 10, 9, 8, 5, 5, 3, 2, 1, 1, 0])
V, D, N = len(COUNTS), 6, 9
TARGETS = {0, 2, 4, 6, 8, 10, 12, 14, 16}


def setting(**options) -> tuple[TargetSampling, torch.Tensor, torch.Tensor]:
    layer = TargetSampling(D, COUNTS, sparse=False, **options).double()
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    return layer, hidden, torch.tensor(sorted(TARGETS))


def test_the_objective_equals_its_oracle():
    layer, hidden, target = setting(samples=12)
    layer.observe(torch.tensor([[0, 7, 7], [2, 1, 0]]))
    sample = layer.draw(hidden, target)
    expected = oracles.target_sampling_objective(
        layer.logits(hidden).detach().numpy(), target.tolist(), sample.ids.tolist()
    )
    torch.testing.assert_close(layer(hidden, target, None, sample), torch.from_numpy(expected))


def test_candidates_are_the_announced_targets_those_of_the_call_and_enough_others():
    layer, hidden, target = setting(samples=12)
    found = set(layer.draw(hidden, target).ids.tolist())
    assert found > TARGETS and len(found) == 12
    layer.observe(torch.tensor([[1, 3], [3, 2]]))
    ids = layer.draw(hidden[:2], target[:2]).ids.tolist()
    assert set(ids) > {0, 1, 2, 3} and len(ids) == len(set(ids)) == 12
    layer.observe(torch.arange(14))
    assert layer.draw(hidden[:2], target[:2]).ids.tolist() == list(range(14))
    layer.observe(torch.tensor([17]))
    assert {0, 2, 17} < set(layer.draw(hidden[:2], target[:2]).ids.tolist())
    assert layer.draw(hidden[:2], target[:2]).ids.shape == (12,)


def test_words_fill_up_at_random():
    """The first draws of a systematic sample are neighbours: they would be all in one half, or none of them."""
    layer = TargetSampling(D, torch.ones(100), samples=20)
    hidden, target = torch.randn(10, D), torch.arange(0, 100, 10)
    drawn = torch.stack([layer.draw(hidden, target).ids.bincount(minlength=100) for _ in range(500)]).double()
    expected = torch.full((100,), 10 / 90, dtype=torch.float64)
    expected[target] = 1
    assert_mean(drawn, expected)
    assert drawn[:, :50].sum(1).var() < 4  # 2.2 for a random choice of 10 from 90


def test_words_fill_up_from_the_noise():
    layer, hidden, target = setting(samples=5, noise="unigram")
    drawn = torch.stack([layer.draw(hidden[:1], target[8:]).ids.bincount(minlength=V) for _ in range(500)])
    frequency = drawn.double().mean(0)
    assert frequency[0] > 0.7 and frequency[1] > 0.5 and frequency[17] < 0.05 and frequency[16] == 1


@pytest.mark.parametrize("options", [{"samples": 1.0}, {"samples": 2}])
def test_with_all_words_as_candidates_it_is_the_exact_softmax(options):
    layer, hidden, target = setting(**options)
    if options["samples"] == 2:
        layer.observe(torch.arange(V))
    actual, expected = layer(hidden, target), layer.nll(hidden, target)
    torch.testing.assert_close(actual, expected)
    slopes = [torch.autograd.grad(value.sum(), layer.weight)[0] for value in (actual, expected)]
    torch.testing.assert_close(*slopes)


def test_the_optimum_overestimates_words_that_are_seldom_candidates():
    """On average over stretches the slope vanishes about where ``s = log p - log r``, and not where ``s = log p``."""
    tokens, repeats = 20, 400
    layer = TargetSampling(D, COUNTS, samples=1, sparse=False).double()
    p = ops.noise_probability(COUNTS, "unigram", 0.5)
    stretch = p.multinomial(repeats * tokens, True, generator=torch.Generator().manual_seed(0)).view(repeats, tokens)
    present = 1 - (1 - p) ** tokens

    def slope(scores: torch.Tensor) -> float:
        with torch.no_grad():
            layer.bias.copy_(scores)
        for target in stretch:
            layer.observe(target)
            hidden = torch.zeros(tokens, D, dtype=torch.float64)
            layer.loss(hidden, target, torch.full((tokens,), 1 / (repeats * tokens), dtype=torch.float64)).backward()
        gradient, layer.bias.grad = layer.bias.grad, None
        return (gradient / p).abs().max().item()

    assert slope(p.log() - present.log()) < 0.15 < 0.3 < slope(p.log())


def test_an_announced_word_outside_of_the_vocabulary_is_an_error():
    layer = TargetSampling(D, COUNTS, samples=2)
    with pytest.raises(ValueError, match=r"ids from -100 to 3: they must be in \[0, 18\)"):
        layer.observe(torch.tensor([3, -100]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"samples": 0}, "samples=0"),
        ({"samples": 19}, "samples=19: more than the 18 words"),
        ({"power": -1.0}, "power=-1.0"),
    ],
)
def test_settings_out_of_range_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        TargetSampling(D, COUNTS, **options)
