import math
from typing import get_args

import numpy as np
import oracles
import pytest
import torch
from cases import assert_mean, noise_probability, toy_bigrams

from lvsoftmax.layers.noise_contrastive_estimation import NoiseContrastiveEstimation
from lvsoftmax.noise import NoiseName
from lvsoftmax.ops import noise as ops

COUNTS = torch.tensor([900, 400, 300, 200, 100, 50, 30, 20, 10, 9, 8, 5, 5, 3, 2, 1, 1, 0])
V, D, N = len(COUNTS), 6, 9


def setting(**options) -> tuple[NoiseContrastiveEstimation, torch.Tensor, torch.Tensor]:
    layer = NoiseContrastiveEstimation(D, COUNTS, sparse=False, bigrams=toy_bigrams(V, 0), **options).double()
    layer.refresh()
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    return layer, hidden, torch.arange(N) * 2


def slope(value: torch.Tensor, layer: NoiseContrastiveEstimation) -> torch.Tensor:
    """Derivative by the words' biases: that by their logits, summed over tokens."""
    return torch.autograd.grad(value.sum(), layer.bias)[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"noise_sharing": "token"},
        {"replacement": False},
        {"noise": "uniform"},
    ],
    ids=str,
)
def test_the_expected_gradient_equals_its_closed_form(options):
    layer, hidden, target = setting(samples=5, power=0.5, **options)
    hidden, target = hidden[:1].detach(), target[3:4]
    many = [slope(layer(hidden, target), layer) for _ in range(1000)]
    q = ops.noise_probability(COUNTS, options.get("noise", "unigram"), 0.5)
    expected_count = 5 * q
    if options.get("replacement") is False:
        expected_count = ops.inclusion_mass(q, 5) / ops.DRAW
    data = torch.sigmoid(layer.logits(hidden)[0].detach() - expected_count.log())
    expected = expected_count * data
    expected[target] -= 1 - data[target]
    assert_mean(torch.stack(many), expected)


@pytest.mark.parametrize(
    "options",
    [{"noise": name} for name in ("bigram", "quadratic_kernel", "random_fourier", "midx")]
    + [{"noise_sharing": "token", "replacement": False}],
    ids=str,
)
def test_the_expected_gradient_equals_its_closed_form_also_for_draws_of_a_tokens_own(options):
    size = 4000
    layer, hidden, target = setting(samples=5, **options)
    hidden, target, previous = hidden[:1].detach(), target[3:4], torch.tensor([2])
    many = (hidden.expand(size, -1), target.expand(size), previous.expand(size))
    actual = slope(layer(*many), layer) / size
    expected_count = 5 * noise_probability(layer, hidden, previous, 5)[0]
    data = torch.sigmoid(layer.logits(hidden)[0].detach() - expected_count.log())
    expected = expected_count * data
    expected[target] -= 1 - data[target]
    # a word is drawn about as often as a Poisson variable says, or less variably
    assert ((actual - expected).abs() <= data * (5 * (expected_count / size).sqrt() + 3 / size)).all()


def test_the_expected_gradient_equals_its_closed_form_also_where_the_draws_are_other_targets():
    """A token's own target is no draw for it: kept, it would count ``1`` more than ``(N - 1) q``."""
    layer, hidden, _ = setting(noise="in_batch")
    q = ((COUNTS + 1) / (COUNTS + 1).sum()).double()
    hidden, first, many = hidden.detach(), torch.tensor([4]), []
    for others in torch.multinomial(q, 2000 * (N - 1), True).view(2000, N - 1):
        many.append(slope(layer(hidden, torch.cat([first, others]))[0], layer))
    expected_count = (N - 1) * q
    data = torch.sigmoid(layer.logits(hidden)[0].detach() - expected_count.log())
    expected = expected_count * data
    expected[first] -= 1 - data[first]
    # the noise keeps frequencies to 2^-16 of a word
    error = torch.stack(many)
    assert ((error.mean(0) - expected).abs() <= 4 * error.std(0) / len(error) ** 0.5 + 1e-3 * expected.abs()).all()


@pytest.mark.parametrize("noise", get_args(NoiseName))
def test_the_objective_follows_its_formula_word_by_word(noise):
    """From the noise's probabilities: a correction negated or dropped, or a hit left out, would show."""
    layer, hidden, target = setting(samples=12, noise=noise)
    previous = torch.arange(1, N + 1)
    sample = layer.draw(hidden, target, previous)
    q, logit = noise_probability(layer, hidden, previous, 12).numpy(), layer.logits(hidden).detach().numpy()
    values, hits = [], 0
    for n, ids in enumerate(sample.ids.expand(N, -1).numpy()):
        ids = np.delete(ids, n) if noise == "in_batch" else ids
        hits += (ids == target[n].item()).sum()
        log_q = np.log(q[n])
        own = [target[n].item()]
        values += oracles.noise_contrastive_objective(
            logit[n, own], logit[n : n + 1, ids], log_q[own], log_q[ids], len(ids)
        ).tolist()
    assert hits > 0 or noise == "in_batch"
    actual = layer(hidden, target, previous, sample).detach().numpy()
    np.testing.assert_allclose(actual, values, rtol=2e-4)
    weight = torch.rand(N, dtype=torch.float64)
    loss = layer.loss(hidden, target, weight, previous, sample)
    np.testing.assert_allclose(loss.item(), weight.numpy() @ actual, rtol=1e-6)


def test_with_all_words_drawn_once_it_is_the_sum_over_the_vocabulary():
    layer, hidden, target = setting(samples=1.0, replacement=False)
    odds = layer.logits(hidden)
    own = odds.gather(1, target[:, None]).sigmoid().log().squeeze(1)
    expected = -own - (1 - odds.sigmoid()).log().sum(1)
    torch.testing.assert_close(layer(hidden, target), expected)


def test_the_truth_is_the_optimum():
    """At ``s - c = log p`` the slopes vanish on average over targets from p; not if c is off, nor without the hits."""
    layer, hidden, _ = setting(samples=1.0, replacement=False)
    with torch.no_grad():
        layer.weight.zero_()
        p = torch.rand(V, dtype=torch.float64).softmax(0)
        layer.bias.copy_(p.log())
    hidden, target = hidden[:1].expand(V, D), torch.arange(V)
    torch.testing.assert_close(slope(p * layer(hidden, target), layer), torch.zeros_like(p), rtol=0, atol=1e-8)
    with torch.no_grad():
        layer.bias += 0.1
    assert slope(p * layer(hidden, target), layer).abs().max() > 1e-3


def test_draws_of_the_target_count_like_others():
    layer, hidden, target = setting(samples=4)
    sample = layer.draw(hidden, target)._replace(ids=torch.tensor([1, 2, 5, 7]), log_expected=torch.zeros(4))
    assert target[1] == 2
    without = sample._replace(ids=sample.ids[[0, 2, 3]], log_expected=torch.zeros(3))
    assert (layer(hidden, target, None, sample) > layer(hidden, target, None, without)).all()


@pytest.mark.parametrize("normaliser", ["fixed", "learned"])
@pytest.mark.parametrize("bias", [False, True])
def test_an_untrained_layer_is_normalised(bias, normaliser):
    layer = NoiseContrastiveEstimation(D, COUNTS, bias=bias, normaliser=normaliser)
    torch.testing.assert_close(layer.log_partition(torch.zeros(3, D)), torch.zeros(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("noise_sharing", ["batch", "token"])
def test_the_learned_normaliser_moves_all_logits_alike(noise_sharing):
    layer, hidden, target = setting(samples=4, normaliser="learned", noise_sharing=noise_sharing)
    sample = layer.draw(hidden, target)
    for value in (layer(hidden, target, None, sample).sum(), layer.loss(hidden, target, torch.ones(N), None, sample)):
        by_normaliser, by_bias = torch.autograd.grad(value, [layer.log_normaliser, layer.bias])
        torch.testing.assert_close(by_normaliser[0], -by_bias.sum())
    assert not NoiseContrastiveEstimation(D, COUNTS, normaliser="fixed").log_normaliser.requires_grad


def test_every_token_draws_for_itself_or_all_draw_together():
    layer, hidden, target = setting(samples=4)
    assert layer.draw(hidden, target).ids.shape == (4,)
    layer, hidden, target = setting(samples=4, noise_sharing="token")
    assert layer.draw(hidden, target).ids.shape == (N, 4)


@pytest.mark.parametrize("noise_sharing", ["batch", "token"])
def test_no_gradient_leaves_the_rows_of_targets_and_draws(noise_sharing):
    layer = NoiseContrastiveEstimation(D, COUNTS, samples=4, noise_sharing=noise_sharing)
    hidden, target = torch.randn(3, D), torch.tensor([17, 17, 3])
    sample = layer.draw(hidden, target)
    layer.loss(hidden, target, torch.ones(3), None, sample).backward()
    for parameter in (layer.weight, layer.bias):
        assert parameter.grad.is_sparse
        assert set(parameter.grad.coalesce().indices()[0].tolist()) == {17, 3, *sample.ids.flatten().tolist()}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"samples": 0}, "samples=0"),
        ({"samples": -0.5}, "samples=-0.5"),
        ({"samples": 19, "replacement": False}, "samples=19: more than the 18 words"),
        ({"power": math.nan}, "power=nan"),
    ],
)
def test_settings_out_of_range_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        NoiseContrastiveEstimation(D, COUNTS, **options)
