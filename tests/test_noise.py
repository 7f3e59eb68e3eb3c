import itertools
import math
from typing import get_args

import pytest
import torch
from cases import zipf_counts

from lvsoftmax.noise import NoiseName, make_noise, number_of_samples
from lvsoftmax.noise.distinct import DistinctNoise
from lvsoftmax.noise.independent import IndependentNoise
from lvsoftmax.ops import noise as ops
from lvsoftmax.ops.noise import COLUMN, DRAW

COUNTS = torch.tensor([50, 20, 9, 9, 4, 1, 0])
NO_HIDDEN = torch.empty(0)  # fixed distributions look at no hidden vector
NOISES = ["uniform", "log_uniform", "unigram"]
for_every_noise = pytest.mark.parametrize("noise", NOISES)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def close_to_its_mean(observed: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, size: int) -> bool:
    return bool(((observed - mean).abs() <= 5 * (variance / size).sqrt() + 1e-12).all())


# -- distributions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0, 2.0])
def test_probabilities_follow_their_formulas(power):
    weights = {
        "uniform": [1.0] * 7,
        "log_uniform": [math.log((rank + 2) / (rank + 1)) for rank in range(7)],
        "unigram": [50, 20, 9, 9, 4, 1, 1],  # a word never seen counts as seen once
    }
    for noise, weight in weights.items():
        expected = [w**power / sum(v**power for v in weight) for w in weight]
        assert ops.noise_probability(COUNTS, noise, power).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("power", [-0.5, math.nan, math.inf])
def test_a_power_that_is_no_exponent_is_an_error(power):
    with pytest.raises(ValueError, match=f"power={power}"):
        ops.noise_probability(COUNTS, "unigram", power)


def test_sample_counts_are_absolute_or_shares_rounded_up():
    assert [ops.sample_count("samples", value, 97) for value in (1, 500, 0.05, 1.0, 1e-9)] == [1, 500, 5, 97, 1]
    assert ops.sample_count("samples", 0.07, 100) == 7 < 0.07 * 100  # which is no 7 in floating point


@pytest.mark.parametrize("value", [0, -3, 0.0, -0.5, 1.5, math.nan])
def test_a_sample_count_out_of_range_is_an_error(value):
    with pytest.raises(ValueError, match=f"samples={value}"):
        ops.sample_count("samples", value, 97)


@pytest.mark.parametrize("noise", get_args(NoiseName))
@pytest.mark.parametrize("per_token", [False, True])
def test_without_a_number_a_tenth_is_drawn_where_tokens_do_not_share(noise, per_token):
    bigrams = torch.tensor([[0, 1, 3]]) if noise == "bigram" else None
    options = {"hidden_size": 8, "per_token": per_token, "bigrams": bigrams}
    count = number_of_samples("samples", None, noise, 2000, per_token=per_token)
    drawn = make_noise(noise, zipf_counts(2000), count, **options)
    drawn.refresh(torch.randn(2000, 8), None)
    sample = drawn.draw(torch.randn(5, 8), torch.arange(5), torch.arange(5), generator())
    assert count == {1: 100, 2: 10}[sample.ids.ndim]
    assert number_of_samples("samples", 0.2, noise, 2000, per_token=per_token) == 400
    assert number_of_samples("samples", 7, noise, 2000, per_token=per_token) == 7


# -- with replacement -------------------------------------------------------------------------------------------------


@for_every_noise
@pytest.mark.parametrize("size", [2, 7, 1000])
def test_alias_columns_hold_exactly_each_words_mass(noise, size):
    probability = ops.noise_probability(torch.arange(size, 0, -1) ** 2, noise)
    table = ops.alias_table(probability)
    assert ((table.threshold >= 0) & (table.threshold <= COLUMN)).all()
    held = table.threshold.clone().index_add_(0, table.alias, COLUMN - table.threshold)
    assert torch.equal(held, table.mass)
    assert table.mass.sum() == size * COLUMN
    assert ((table.mass - probability * size * COLUMN).abs() < 2).all()  # rounded, then evened out


def test_every_word_keeps_some_mass_however_improbable():
    for mass in (ops.alias_table(probability := torch.tensor([1.0, 1e-30, 0.0]).double()).mass,
                 ops.inclusion_mass(probability, 1)):  # fmt: skip
        assert (mass >= 1).all()


@for_every_noise
def test_frequencies_of_independent_draws(noise):
    size = 200_000
    ids = IndependentNoise(COUNTS, noise, 0.75, size).draw(NO_HIDDEN, torch.tensor([0]), None, generator()).ids
    q = ops.noise_probability(COUNTS, noise, 0.75)
    assert close_to_its_mean(ids.bincount(minlength=7) / size, q, q * (1 - q), size)


def test_every_token_draws_for_itself():
    noise = IndependentNoise(COUNTS, "unigram", 0.75, 40_000, per_token=True)
    target = torch.tensor([6, 0])
    ids, log_expected, target_log_expected = noise.draw(NO_HIDDEN, target, None, generator())
    assert ids.shape == (2, 40_000) and not torch.equal(ids[0], ids[1])
    q = ops.noise_probability(COUNTS, "unigram", 0.75)
    for row in ids:
        assert close_to_its_mean(row.bincount(minlength=7) / 40_000, q, q * (1 - q), 40_000)
    expected = (40_000 * q).log().float()
    torch.testing.assert_close(log_expected, expected[ids])
    torch.testing.assert_close(target_log_expected, expected[target])


@for_every_noise
def test_independent_draws_know_their_expected_counts(noise):
    sample = IndependentNoise(COUNTS, noise, 0.75, 40).draw(NO_HIDDEN, torch.tensor([6, 0]), None, generator())
    expected = (40 * ops.noise_probability(COUNTS, noise, 0.75)).log().float()
    torch.testing.assert_close(sample.log_expected, expected[sample.ids])
    torch.testing.assert_close(sample.target_log_expected, expected[[6, 0]])


@pytest.mark.parametrize("per_token", [False, True])
def test_the_first_draws_are_a_sample_of_their_own(per_token):
    noise = IndependentNoise(COUNTS, "unigram", 1.0, 40, per_token=per_token)
    whole = noise.draw(NO_HIDDEN, torch.tensor([6, 0]), None, generator())
    part = whole.first(10)
    expected = (10 * ops.noise_probability(COUNTS, "unigram")).log().float()
    assert torch.equal(part.ids, whole.ids[..., :10])
    torch.testing.assert_close(part.log_expected, expected[part.ids])
    torch.testing.assert_close(part.target_log_expected, expected[[6, 0]])


def test_log_inclusion_counts_the_draws_that_hold_a_word():
    """By enumeration of all sequences of three draws from three words."""
    q = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    expected = torch.zeros(3, dtype=torch.float64)
    for draws in itertools.product(range(3), repeat=3):
        for word in set(draws):
            expected[word] += q[list(draws)].prod()
    torch.testing.assert_close(ops.log_inclusion((3 * q).log(), 3), expected.log())


def test_log_inclusion_in_float32_at_both_ends():
    log_expected = torch.tensor([-30.0, -10.0, 5.0, math.log(100.0)])
    expected = ops.log_inclusion(log_expected.double(), 100)
    torch.testing.assert_close(ops.log_inclusion(log_expected, 100).double(), expected, rtol=1e-5, atol=1e-6)
    assert ops.log_inclusion(log_expected, 100)[-1] == 0


# -- without replacement ----------------------------------------------------------------------------------------------


@for_every_noise
@pytest.mark.parametrize("count", [1, 3, 6, 7])
def test_inclusion_probabilities_are_proportional_up_to_one(noise, count):
    q = ops.noise_probability(COUNTS, noise)
    mass = ops.inclusion_mass(q, count)
    assert mass.sum() == count * DRAW
    assert ((mass >= 1) & (mass <= DRAW)).all()
    inclusion = mass.double() / DRAW
    uncertain = mass < DRAW
    if uncertain.any():
        scale = (inclusion / q)[uncertain]
        torch.testing.assert_close(scale, scale[0].expand_as(scale), rtol=1e-9, atol=0)
        assert (scale[0] * q[~uncertain] >= 1).all()


def test_all_words_are_certain_when_all_are_drawn():
    for noise, size in itertools.product(NOISES, [2, 97, 100_000]):
        mass = ops.inclusion_mass(ops.noise_probability(torch.arange(size, 0, -1), noise), size)
        assert (mass == DRAW).all()


@pytest.mark.parametrize(
    "eighths",
    [
        [8, 7, 5, 3, 1],
        [7, 7, 7, 7, 4],  # every stratum has a word on either border
        [5] * 8,
        [8] * 4,
        [1] * 24,
        [4, 4, 8, 1, 7, 8, 3, 5, 6, 2],
    ],
    ids=str,
)
def test_inclusion_is_exact_whatever_lies_on_a_border(eighths):
    mass, size = torch.tensor(eighths) * (DRAW // 8), 200_000
    count = sum(eighths) // 8
    ids = ops.draw_distinct(mass.cumsum(0), (size, count), generator())
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    p = mass.double() / DRAW
    assert close_to_its_mean(ids.flatten().bincount(minlength=len(mass)) / size, p, p * (1 - p), size)


@pytest.mark.parametrize("count", [1, 3, 24, 90])
@for_every_noise
def test_frequencies_of_distinct_draws(noise, count):
    size, counts = 50_000, torch.arange(97, 0, -1) ** 2
    noise = DistinctNoise(counts, noise, 1.0, count, per_token=True)
    ids = noise.draw(NO_HIDDEN, torch.zeros(size, dtype=torch.long), None, generator()).ids
    assert ids.shape == (size, count)
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    inclusion = noise.mass.double() / DRAW
    frequency = ids.flatten().bincount(minlength=97) / size
    assert close_to_its_mean(frequency, inclusion, inclusion * (1 - inclusion), size)


def test_all_pairs_can_meet():
    """What strata that always begin at the same word would lose: those of one stratum would never be drawn together."""
    noise, source, pairs = DistinctNoise(torch.ones(6), "uniform", 1.0, 2), generator(), set()
    for _ in range(300):
        pairs.add(tuple(sorted(noise.draw(NO_HIDDEN, torch.tensor([0]), None, source).ids.tolist())))
    assert len(pairs) == 15


@for_every_noise
def test_distinct_draws_know_their_inclusion(noise):
    noise = DistinctNoise(COUNTS, noise, 1.0, 3)
    sample = noise.draw(NO_HIDDEN, torch.tensor([6, 0]), None, generator())
    expected = (noise.mass.double() / DRAW).log().float()
    torch.testing.assert_close(sample.log_expected, expected[sample.ids])
    torch.testing.assert_close(sample.target_log_expected, expected[[6, 0]])


def test_more_distinct_draws_than_words_are_an_error():
    with pytest.raises(ValueError, match="samples=8: more than the 7 words .* lower samples, or draw with replacement"):
        DistinctNoise(COUNTS, "unigram", 1.0, 8)


def test_words_fill_up_a_set_in_their_order():
    member = torch.tensor([False, True, False, False, True, False, False])
    assert ops.fill_up(member, torch.tensor([5, 1, 3, 0])).tolist() == [1, 3, 4, 5]
    assert ops.fill_up(member, torch.tensor([4, 0, 1])).tolist() == [0, 1, 4]
    assert ops.fill_up(member, torch.tensor([0])).tolist() == [1, 4]
    assert ops.fill_up(member, torch.arange(7)).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert member.sum() == 2


# -- as a part of a layer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [lambda: IndependentNoise(COUNTS, "unigram", 1.0, 3),
                                   lambda: DistinctNoise(COUNTS, "unigram", 1.0, 3)])  # fmt: skip
def test_casting_a_layer_does_not_change_its_noise(build):
    target = torch.tensor([1])
    samples = [noise.draw(NO_HIDDEN, target, None, generator()) for noise in (build(), build().bfloat16())]
    for one, other in zip(*samples, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("saved", [2, 4])
def test_weights_saved_with_another_number_of_distinct_draws_are_refused(saved):
    state = torch.nn.ModuleDict({"noise": DistinctNoise(COUNTS, "unigram", 1.0, saved)}).state_dict()
    module = torch.nn.ModuleDict({"noise": DistinctNoise(COUNTS, "unigram", 1.0, 3)})
    with pytest.raises(ValueError, match=f"noise draws 3 words and was saved where it drew {saved}; build the layer"):
        module.load_state_dict(state)
    module.load_state_dict(module.state_dict())
