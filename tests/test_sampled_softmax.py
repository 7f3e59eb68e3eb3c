from typing import get_args

import numpy as np
import oracles
import pytest
import torch
from cases import noise_probability, toy_bigrams

from lvsoftmax.layers.sampled_softmax import SampledSoftmax
from lvsoftmax.noise import NoiseName, make_noise
from lvsoftmax.ops.noise import FixedNoiseName, Sample, log_expected_count

COUNTS = torch.tensor([900, 400, 300, 200, 100, 50, 30, 20, 10, 9, 8, 5, 5, 3, 2, 1, 1, 0])
V, D, N = len(COUNTS), 6, 9
for_every_noise = pytest.mark.parametrize("noise", get_args(NoiseName))
for_every_fixed_noise = pytest.mark.parametrize("noise", ["uniform", "log_uniform", "unigram"])
for_every_positive = pytest.mark.parametrize("positive", ["sampled", "corrected"])


def setting(**options) -> tuple[SampledSoftmax, torch.Tensor, torch.Tensor]:
    layer = SampledSoftmax(D, COUNTS, sparse=False, bigrams=toy_bigrams(V, 0), **options).double()
    layer.refresh()
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    return layer, hidden, torch.arange(N) * 2


def gradient_of_table(value: torch.Tensor, layer: SampledSoftmax) -> torch.Tensor:
    return torch.autograd.grad(value.sum(), layer.weight)[0]


@for_every_fixed_noise
def test_with_all_words_drawn_it_is_the_exact_softmax(noise):
    layer, hidden, target = setting(samples=1.0, noise=noise)
    actual, expected = layer(hidden, target), layer.nll(hidden, target)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradient_of_table(actual, layer), gradient_of_table(expected, layer))


@for_every_positive
@pytest.mark.parametrize("noise", [name for name in get_args(NoiseName) if name != "in_batch"])
def test_with_many_draws_with_replacement_it_approaches_the_exact_softmax(noise, positive):
    """It would not, were a target's correction its expected count: frequent words would lose their own share."""
    layer, hidden, target = setting(samples=100_000, noise=noise, replacement=True, positive=positive)
    previous = torch.arange(1, N + 1)
    actual, expected = layer(hidden, target, previous), layer.nll(hidden, target)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.02)
    torch.testing.assert_close(gradient_of_table(actual, layer), gradient_of_table(expected, layer), rtol=0, atol=0.02)


@for_every_positive
@pytest.mark.parametrize("replacement", [None, True])
@for_every_noise
def test_the_objective_follows_its_formula_word_by_word(noise, replacement, positive):
    """From the noise's probabilities: a correction of draws or target negated or dropped, a hit kept, would show."""
    layer, hidden, target = setting(samples=12, noise=noise, replacement=replacement, positive=positive)
    previous = torch.arange(1, N + 1)
    sample = layer.draw(hidden, target, previous)
    ids = sample.ids.expand(N, -1).numpy()
    q, draws = noise_probability(layer, hidden, previous, 12).numpy(), ids.shape[1] - layer.noise.holds_targets
    logit = layer.logits(hidden).detach().numpy()
    hits, values = 0, []
    for n, word in enumerate(target.tolist()):
        if layer.noise.distinct:
            correction, own = np.log(q[n] * draws), np.log(q[n, word] * draws)
        else:
            correction, own = np.log(draws * q[n]), np.log(1 - (1 - q[n, word]) ** draws)
        if positive == "corrected":
            own = 0.0
        hits += (ids[n] == word).sum()
        values += oracles.sampled_softmax_objective(
            [word], ids[n], logit[n : n + 1, word], logit[n : n + 1, ids[n]], [own], correction[ids[n]]
        ).tolist()
    assert hits > 0
    actual = layer(hidden, target, previous, sample).detach().numpy()
    np.testing.assert_allclose(actual, values, rtol=2e-4)
    weight = torch.rand(N, dtype=torch.float64)
    loss = layer.loss(hidden, target, weight, previous, sample)
    np.testing.assert_allclose(loss.item(), weight.numpy() @ actual, rtol=1e-6)


@pytest.mark.parametrize("noise", [name for name in get_args(NoiseName) if name != "in_batch"])
def test_draws_other_than_the_target_estimate_the_sum_over_the_other_words(noise):
    """``E sum_{k != t} exp(s_k - l_k) = sum_{w != t} exp(s_w)``, what ``positive=corrected`` rests on."""
    layer, hidden, target = setting(samples=6, noise=noise)
    if noise in get_args(FixedNoiseName):
        layer.noise = make_noise(noise, COUNTS, 6, replacement=False, per_token=True)
    size, token = 20_000, 1
    hidden, target, previous = hidden[token : token + 1].detach(), target[token : token + 1], torch.tensor([2])
    ids, log_expected, _ = layer.draw(*(x.expand(size, *x.shape[1:]) for x in (hidden, target, previous)))
    exp = layer.logits(hidden)[0].detach().exp()
    estimates = torch.where(ids == target, 0.0, exp[ids] / log_expected.exp()).sum(1)
    expected = exp.sum() - exp[target]
    assert (estimates.mean() - expected).abs() <= 4 * estimates.std() / len(estimates) ** 0.5


def test_in_batch_draws_other_than_the_target_estimate_the_sum_over_the_other_words():
    layer, hidden, _ = setting(noise="in_batch")
    q = (COUNTS + 1) / (COUNTS + 1).sum()
    exp, estimates, expected = layer.logits(hidden)[0].detach().exp(), [], []
    for target in torch.multinomial(q, 4000 * N, True).view(4000, N):
        ids, log_expected, _ = layer.draw(hidden, target)
        estimates.append(torch.where(ids == target[0], 0.0, exp[ids] / log_expected.exp()).sum())
        expected.append(exp.sum() - exp[target[0]])
    error = torch.stack(estimates) - torch.stack(expected)
    assert error.mean().abs() <= 4 * error.std() / len(error) ** 0.5


def test_corrected_it_has_the_gradient_of_the_target_against_the_draws_weighted_by_its_doubt():
    """Khrylchenko et al. 2025: ``(1 - p_t) (-s_t + log sum_{k != t} exp(s_k - l_k))``, the weight a constant."""
    layer, hidden, target = setting(samples=8, noise="midx", positive="corrected")
    sample = layer.draw(hidden, target)
    logits = layer.logits(hidden)
    others = (logits.gather(1, sample.ids) - sample.log_expected).masked_fill(sample.ids == target[:, None], -torch.inf)
    own = logits.gather(1, target[:, None]).squeeze(1)
    doubt = torch.sigmoid(others.logsumexp(1) - own).detach()
    expected = gradient_of_table(doubt * (others.logsumexp(1) - own), layer)
    torch.testing.assert_close(gradient_of_table(layer(hidden, target, None, sample), layer), expected)


@pytest.mark.parametrize("replacement", [False, True])
def test_a_draw_of_the_target_itself_is_left_out(replacement):
    layer, hidden, target = setting(samples=4, replacement=replacement)
    words = torch.tensor([1, 0, 2, 4])
    sample = Sample(words, torch.tensor([-0.3, -0.7, 0.2, -1.0]), torch.zeros(N))
    rest = words != 2
    without = Sample(words[rest], sample.log_expected[rest], sample.target_log_expected)
    token = torch.arange(N) == 1
    assert target[token] == 2
    assert layer(hidden, target, None, sample)[token] == layer(hidden, target, None, without)[token]
    assert (layer(hidden, target, None, sample)[~token] > layer(hidden, target, None, without)[~token]).all()


def test_the_correction_of_draws_and_targets():
    layer, hidden, target = setting(samples=5, replacement=True)
    sample = layer.draw(hidden, target)
    expected_count = log_expected_count(layer.noise.mass, torch.arange(V), 5).exp()
    torch.testing.assert_close(sample.log_expected.exp(), expected_count[sample.ids])
    torch.testing.assert_close(sample.target_log_expected.exp(), (1 - (1 - expected_count / 5) ** 5)[target])
    layer, hidden, target = setting(samples=5)
    sample = layer.draw(hidden, target)
    inclusion = layer.noise.mass / layer.noise.mass.sum() * 5
    torch.testing.assert_close(sample.log_expected.exp(), inclusion[sample.ids])
    torch.testing.assert_close(sample.target_log_expected.exp(), inclusion[target])


def test_a_call_draws_anew_and_a_given_sample_is_kept():
    layer, hidden, target = setting(samples=4)
    sample = layer.draw(hidden, target)
    assert torch.equal(layer(hidden, target, None, sample), layer(hidden, target, None, sample))
    assert len({tuple(layer(hidden, target).tolist()) for _ in range(20)}) > 1


def test_no_gradient_leaves_the_rows_of_targets_and_draws():
    layer = SampledSoftmax(D, COUNTS, samples=4)
    target = torch.tensor([17, 17, 3])
    sample = layer.draw(torch.randn(3, D), target)
    layer(torch.randn(3, D), target, None, sample).sum().backward()
    for parameter in (layer.weight, layer.bias):
        assert parameter.grad.is_sparse
        assert set(parameter.grad.coalesce().indices()[0].tolist()) == {17, 3, *sample.ids.tolist()}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"samples": 0}, "samples=0"),
        ({"samples": 1.5}, "samples=1.5"),
        ({"samples": 19}, "samples=19: more than the 18 words"),
        ({"power": -1.0}, "power=-1.0"),
        ({"noise": "midx", "replacement": False}, "replacement=False: noise=midx"),
        ({"noise": "midx", "power": 0.5}, "power=0.5: noise=midx"),
        ({"noise": "bigram"}, "bigrams=None"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        SampledSoftmax(D, COUNTS, **options)
