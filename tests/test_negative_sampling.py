import pytest
import torch
from cases import assert_mean

from lvsoftmax.layers.negative_sampling import NegativeSampling
from lvsoftmax.layers.noise_contrastive_estimation import NoiseContrastiveEstimation
from lvsoftmax.ops import noise as ops

COUNTS = torch.tensor([900, 400, 300, 200, 100, 50, 30, 20, 10, 9, 8, 5, 5, 3, 2, 1, 1, 0])
V, D, N = len(COUNTS), 6, 9


def setting(**options) -> tuple[NegativeSampling, torch.Tensor, torch.Tensor]:
    layer = NegativeSampling(D, COUNTS, sparse=False, **options).double()
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    return layer, hidden, torch.arange(N) * 2


def scores(layer: NegativeSampling, hidden: torch.Tensor) -> torch.Tensor:
    return (hidden @ layer.weight.T + layer.bias).detach()


def expected_count(options: dict, count: int) -> torch.Tensor:
    q = ops.noise_probability(COUNTS, options.get("noise", "unigram"), options.get("power", 0.75))
    return count * q if options.get("replacement", True) else ops.inclusion_mass(q, count).double() / ops.DRAW


NOISES = [{}, {"power": 1.0}, {"noise": "uniform"}, {"noise": "log_uniform", "replacement": False}]


@pytest.mark.parametrize("options", NOISES, ids=str)
def test_the_model_knows_how_often_words_are_drawn(options):
    layer, hidden, target = setting(samples=5, **options)
    expected = expected_count(options, 5)
    torch.testing.assert_close(layer.log_expected.exp(), expected, rtol=1e-6, atol=0)
    drawn = torch.stack([layer.draw(hidden, target).ids.bincount(minlength=V) for _ in range(2000)]).double()
    assert_mean(drawn, expected)


@pytest.mark.parametrize("options", [{"power": 0.5}, {"power": 0.5, "noise_sharing": "token"}], ids=str)
def test_the_expected_gradient_equals_its_closed_form(options):
    layer, hidden, target = setting(samples=5, **options)
    hidden, target = hidden[:1].detach(), target[3:4]
    many = [torch.autograd.grad(layer(hidden, target).sum(), layer.bias)[0] for _ in range(1000)]
    data = scores(layer, hidden)[0].sigmoid()
    expected = expected_count(options, 5) * data
    expected[target] -= 1 - data[target]
    assert_mean(torch.stack(many), expected)


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("bias", [True, False])
def test_it_may_be_built_in_double(bias):
    layer = NegativeSampling(D, COUNTS, bias=bias)
    expected = torch.log_softmax(torch.nn.functional.linear(torch.ones(2, D), *layer.operands(torch.ones(2, D))[1:]), 1)
    torch.testing.assert_close(layer.log_prob(torch.ones(2, D)), expected)


@pytest.mark.parametrize("options", NOISES, ids=str)
def test_at_the_optimum_the_distribution_is_the_truth(options):
    """The bias that solves ``p sigmoid(-s) = K q sigmoid(s)`` word by word, found without knowing the solution."""
    layer, _, _ = setting(samples=5, **options)
    p, noise = torch.rand(V, dtype=torch.float64).softmax(0), expected_count(options, 5)
    low, high = torch.full_like(p, -50.0), torch.full_like(p, 50.0)
    for _ in range(60):
        middle = (low + high) / 2
        rising = p * torch.sigmoid(-middle) > noise * torch.sigmoid(middle)
        low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(low)
    log_prob = layer.log_prob(torch.randn(1, D, dtype=torch.float64))[0]
    torch.testing.assert_close(log_prob.exp(), p, rtol=1e-6, atol=0)
    assert (low.softmax(0) - p).abs().max() > 0.05 or options.get("noise") == "uniform"


def test_it_is_noise_contrastive_estimation_of_shifted_scores():
    layer, hidden, target = setting(samples=5)
    other = NoiseContrastiveEstimation(D, COUNTS, samples=5, power=0.75, sparse=False).double()
    with torch.no_grad():
        other.weight.copy_(layer.weight)
        other.bias.copy_(layer.bias + layer.log_expected)
    sample = layer.draw(hidden, target)
    torch.testing.assert_close(layer(hidden, target, None, sample), other(hidden, target, None, sample))
    torch.testing.assert_close(layer.log_prob(hidden), other.log_prob(hidden))


def test_with_all_words_drawn_once_it_is_the_sum_over_the_vocabulary():
    layer, hidden, target = setting(samples=1.0, replacement=False)
    score = scores(layer, hidden)
    own = score.gather(1, target[:, None]).sigmoid().log().squeeze(1)
    torch.testing.assert_close(layer(hidden, target), -own - (1 - score.sigmoid()).log().sum(1))


def test_diagnostics_compare_with_the_softmax_of_the_scores():
    layer, hidden, target = setting(samples=5)
    assert layer.diagnostics() == {}
    layer.loss(hidden, target, torch.ones(N))
    found = layer.diagnostics()
    of_scores = -scores(layer, hidden).log_softmax(1).gather(1, target[:, None]).mean()
    assert found["nll"] == pytest.approx(layer.nll(hidden, target).mean().item())
    assert found["nll_of_scores"] == pytest.approx(of_scores.item())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"samples": 0}, "samples=0"),
        ({"samples": 19, "replacement": False}, "samples=19: more than the 18 words"),
        ({"power": -0.75}, "power=-0.75"),
    ],
)
def test_settings_out_of_range_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        NegativeSampling(D, COUNTS, **options)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("noise", ["bigram", "quadratic_kernel"])
def test_noise_that_follows_the_context_is_an_error(noise):
    with pytest.raises(ValueError, match=f"noise='{noise}'"):
        NegativeSampling(D, COUNTS, noise=noise)
