import numpy as np
import oracles
import pytest
import torch
from cases import noise_probability, toy_bigrams

from lvsoftmax.layers.importance_sampled_softmax import ImportanceSampledSoftmax
from lvsoftmax.layers.sampled_softmax import SampledSoftmax

COUNTS = torch.tensor([900, 400, 300, 200, 100, 50, 30, 20, 10, 9, 8, 5, 5, 3, 2, 1, 1, 0])
D, N = 6, 9


def setting(**options) -> tuple[ImportanceSampledSoftmax, torch.Tensor, torch.Tensor]:
    layer = ImportanceSampledSoftmax(D, COUNTS, sparse=False, **options).double()
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    return layer, hidden, torch.arange(N) * 2


def effective(layer, hidden, ids) -> float:
    """Mean over the tokens of (sum w)^2 / sum w^2, word by word."""
    q = layer.noise.mass / layer.noise.mass.sum()
    weight = (layer.logits(hidden)[:, ids].exp() / q[ids]).detach()
    return (weight.sum(1) ** 2 / (weight**2).sum(1)).mean().item()


def test_gradients_differ_from_sampled_softmax_on_the_same_draws():
    layer, hidden, target = setting(samples=8, ess_target=None)
    other = SampledSoftmax(D, COUNTS, samples=8, noise="unigram", replacement=True, sparse=False).double()
    other.load_state_dict(layer.state_dict())
    sample = layer.draw(hidden, target)
    gradients = [torch.autograd.grad(x(hidden, target, None, sample).sum(), x.weight)[0] for x in (layer, other)]
    assert (gradients[0] - gradients[1]).norm() > 0.05 * gradients[1].norm()


@pytest.mark.parametrize("noise", ["unigram", "log_uniform"])
def test_with_many_draws_it_approaches_the_exact_softmax(noise):
    layer, hidden, target = setting(samples=400_000, ess_target=None, noise=noise)
    actual, expected = layer(hidden, target), layer.nll(hidden, target)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.02)
    gradients = [torch.autograd.grad(value.sum(), layer.weight)[0] for value in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0.02)


@pytest.mark.parametrize("noise", ["bigram", "quadratic_kernel", "random_fourier", "midx"])
def test_where_the_context_decides_it_follows_its_formula_word_by_word(noise):
    layer, hidden, target = setting(samples=8, ess_target=None, noise=noise, bigrams=toy_bigrams(len(COUNTS), 0))
    layer.refresh()
    previous = torch.arange(1, N + 1)
    sample = layer.draw(hidden, target, previous)
    q, logit = noise_probability(layer, hidden, previous, 8), layer.logits(hidden).detach()
    own, drawn, log_q = logit.gather(1, target[:, None]), logit.gather(1, sample.ids), q.log().gather(1, sample.ids)
    expected = [
        oracles.importance_sampling_objective(*(x.numpy() for x in row))[0]
        for row in zip(own, drawn[:, None], log_q, strict=True)
    ]
    actual = layer(hidden, target, previous, sample).detach().numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("noise", ["bigram", "midx"])
def test_draws_of_a_tokens_own_grow_as_shared_ones_do(noise):
    options = {"ess_target": 12, "max_samples": 1000, "bigrams": toy_bigrams(len(COUNTS), 0)}
    layer, hidden, target = setting(samples=5, noise=noise, **options)
    layer.refresh()
    previous = torch.arange(1, N + 1)
    ids, log_expected, _ = layer.draw(hidden, target, previous)
    q = noise_probability(layer, hidden, previous, 1000)
    torch.testing.assert_close(log_expected.double().exp(), ids.shape[1] * q.gather(1, ids), rtol=1e-4, atol=0)

    def effective(ids):
        weight = layer.logits(hidden).detach().gather(1, ids).exp() / q.gather(1, ids)
        return (weight.sum(1) ** 2 / weight.square().sum(1)).mean()

    assert ids.shape[1] % 5 == 0 and effective(ids) >= 12 > effective(ids[:, :-5])
    assert layer.diagnostics()["samples"] == ids.shape[1]


def test_the_target_is_not_in_the_sum():
    """The value can therefore be negative, which no likelihood can."""
    layer, hidden, target = setting(samples=2, ess_target=None)
    with torch.no_grad():
        layer.bias[target[-1]] += 50
    sample = layer.draw(hidden, target)
    assert target[-1] not in sample.ids
    assert layer(hidden, target, None, sample)[-1] < 0


@pytest.mark.parametrize("ess_target", [4, 10, 25])
def test_draws_grow_by_blocks_until_enough_are_effective(ess_target):
    layer, hidden, target = setting(samples=5, ess_target=ess_target, max_samples=1000)
    ids, log_expected, target_log_expected = layer.draw(hidden, target)
    assert len(ids) % 5 == 0
    expected_count = len(ids) * layer.noise.mass / layer.noise.mass.sum()
    torch.testing.assert_close(log_expected.exp(), expected_count[ids])
    torch.testing.assert_close(target_log_expected.exp(), expected_count[target])
    assert effective(layer, hidden, ids) >= ess_target
    assert len(ids) == 5 or effective(layer, hidden, ids[:-5]) < ess_target


def test_draws_stop_at_the_largest_number_also_within_a_block():
    layer, hidden, target = setting(samples=5, ess_target=12, max_samples=13)
    sample = layer.draw(hidden, target)
    q = layer.noise.mass / layer.noise.mass.sum()
    assert len(sample.ids) == 13
    torch.testing.assert_close(sample.log_expected.exp(), 13 * q[sample.ids])


def test_without_a_target_the_number_of_draws_is_fixed():
    layer, hidden, target = setting(samples=5, ess_target=None, max_samples=1)
    assert len(layer.draw(hidden, target).ids) == 5


def test_diagnostics_are_about_the_latest_draw():
    layer, hidden, target = setting(samples=5, ess_target=6, max_samples=1000)
    assert layer.diagnostics() == {}
    ids = layer.draw(hidden, target).ids
    assert layer.diagnostics() == {
        "samples": len(ids),
        "effective_sample_size": pytest.approx(effective(layer, hidden, ids)),
    }


@pytest.mark.parametrize(
    "options, message",
    [
        ({"samples": 0}, "samples=0"),
        ({"ess_target": -0.1}, "ess_target=-0.1"),
        ({"max_samples": 2.0}, "max_samples=2.0"),
        ({"samples": 9, "max_samples": 8}, "max_samples=8: must be at least samples=9"),
        ({"ess_target": 9, "max_samples": 8}, "max_samples=8: .* ess_target=9"),
        ({"noise": "in_batch"}, "noise='in_batch': choose one of unigram, log_uniform, bigram"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_settings_out_of_range_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        ImportanceSampledSoftmax(D, COUNTS, **options)
