"""Noise that depends on the context or follows a table, against its formulas written a second time, in NumPy."""

import math

import numpy as np
import pytest
import torch

from lvsoftmax.noise import make_noise
from lvsoftmax.noise.random_fourier import RandomFourierNoise
from lvsoftmax.ops import noise as ops
from lvsoftmax.ops.categorical import FEWEST, choose_columns, uniform
from lvsoftmax.ops.multi_index import fit_codebook
from lvsoftmax.ops.noise import COLUMN
from lvsoftmax.ops.quadratic import block_statistics, sums_of_squares

V, D, CONTEXTS = 150, 7, 3  # three blocks of words, the last one of 22
COUNTS = torch.arange(V, 0, -1) ** 2 // 100
BIGRAMS = torch.tensor([[0, 5, 7], [0, 149, 1], [2, 5, 3], [2, 6, 3], [0, 0, 2], [2, 6, 1]])
"""Out of order; one pair counted in two parts; nothing is known to follow word 1."""

OF_CONTEXTS = ["bigram", "quadratic_kernel", "random_fourier", "midx"]
FOLLOWERS = OF_CONTEXTS[1:]
for_every_noise = pytest.mark.parametrize("name", OF_CONTEXTS)
for_every_follower = pytest.mark.parametrize("name", FOLLOWERS)
for_bias_or_none = pytest.mark.parametrize("with_bias", [True, False])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def table(with_bias: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.randn(V, D), torch.randn(V) if with_bias else None


def contexts() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(CONTEXTS, D), torch.tensor([0, 1, 2])


def build(name: str, count: int = 4):
    return make_noise(name, COUNTS, count, hidden_size=D, bigrams=BIGRAMS)


def probability(noise, hidden, previous, count: int) -> torch.Tensor:
    """What the noise says of every word as a target, ``[contexts, V]``."""
    target = torch.arange(V).repeat(len(hidden))
    sample = noise.draw(hidden.repeat_interleave(V, 0), target, previous.repeat_interleave(V), generator())
    return sample.target_log_expected.double().exp().view(-1, V) / count


# -- the formulas -----------------------------------------------------------------------------------------------------


def bigram(noise, weight, bias, hidden, previous) -> np.ndarray:
    """Witten & Bell's interpolation, pair by pair."""
    unigram = np.maximum(COUNTS.numpy(), 1) / np.maximum(COUNTS.numpy(), 1).sum()
    rows = []
    for v in previous.tolist():
        count = np.zeros(V)
        for before, word, times in BIGRAMS.tolist():
            count[word] += times * (before == v)
        followers, total = (count > 0).sum(), count.sum()
        back_off = followers / (followers + total) if total else 1.0
        rows.append((1 - back_off) * count / max(total, 1) + back_off * unigram)
    return np.array(rows)


def quadratic_kernel(noise, weight, bias, hidden, previous) -> np.ndarray:
    """Blanc & Rendle 2018, section 3.3, with alpha = 100, times the exponential of the bias."""
    mass = np.exp(bias) * (100 * (hidden @ weight.T) ** 2 + 1)
    return mass / mass.sum(1, keepdims=True)


def random_fourier(noise, weight, bias, hidden, previous) -> np.ndarray:
    """Rawat et al. 2019, section 3.2, a block of 75 words and then a word of it, nothing below exp(-2)."""
    direction = noise.frequency.double().numpy()

    def features(vector):
        angle = direction @ (vector / np.linalg.norm(vector))
        return np.concatenate([np.cos(angle), np.sin(angle)]) / math.sqrt(len(direction))

    prior, floor = np.exp(bias) / np.exp(bias).sum(), math.exp(-2)
    rows = []
    for h in hidden:
        estimate = np.array([features(h) @ features(w) for w in weight])
        word = prior * np.maximum(estimate, floor)
        blocks = [slice(i, i + FEWEST) for i in range(0, V, FEWEST)]
        mass = np.array([max(prior[b] @ estimate[b], floor * prior[b].sum()) for b in blocks])
        rows.append(
            np.concatenate([m / mass.sum() * word[b] / word[b].sum() for m, b in zip(mass, blocks, strict=True)])
        )
    return np.array(rows)


def midx(noise, weight, bias, hidden, previous) -> np.ndarray:
    """Chen et al. 2022: the softmax of the vectors that the codewords nearest to their halves make up."""
    first, second = noise.first.double().numpy(), noise.second.double().numpy()

    def nearest(half, codebook):
        return codebook[[np.argmin([np.sum((x - c) ** 2) for c in codebook]) for x in half]]

    half = D // 2
    quantised = np.concatenate([nearest(weight[:, :half], first), nearest(weight[:, half:], second)], 1)
    mass = np.exp(hidden @ quantised.T + bias)
    return mass / mass.sum(1, keepdims=True)


FORMULAS = {f.__name__: f for f in (bigram, quadratic_kernel, random_fourier, midx)}


def expected(name, noise, weight, bias, hidden, previous) -> torch.Tensor:
    bias = torch.zeros(V) if bias is None else bias
    arrays = (x.double().numpy() for x in (weight, bias, hidden))
    return torch.from_numpy(FORMULAS[name](noise, *arrays, previous))


# -- what is drawn ----------------------------------------------------------------------------------------------------


@for_bias_or_none
@for_every_noise
def test_probabilities_follow_the_formula_and_sum_to_one(name, with_bias):
    noise, (hidden, previous), (weight, bias) = build(name), contexts(), table(with_bias)
    noise.refresh(weight, bias)
    q = probability(noise, hidden, previous, 4)
    torch.testing.assert_close(q, expected(name, noise, weight, bias, hidden, previous), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(q.sum(1), torch.ones(CONTEXTS, dtype=torch.float64), rtol=1e-5, atol=0)
    assert (q > 0).all()


def test_estimates_of_few_features_are_raised_to_what_the_kernel_is_at_least():
    """With two directions most are far off, and many negative, of blocks, too."""
    noise = RandomFourierNoise(D, V, 4, frequencies=2)
    (hidden, previous), (weight, bias) = contexts(), table()
    weight = -hidden.repeat(V // CONTEXTS, 1) + 0.3 * weight
    noise.refresh(weight, bias)
    q = probability(noise, hidden, previous, 4)
    torch.testing.assert_close(
        q, expected("random_fourier", noise, weight, bias, hidden, previous), rtol=1e-4, atol=1e-8
    )
    sums = noise._features(hidden) @ noise.block_feature.T
    assert (sums < noise.floor * noise.block_factor).any()
    assert (noise._features(hidden) @ noise.feature.T < 0).any()


@for_every_noise
def test_frequencies_of_draws(name):
    size, noise, (hidden, previous), (weight, bias) = 200_000, build(name, 200_000), contexts(), table()
    noise.refresh(weight, bias)
    sample = noise.draw(hidden, torch.zeros(CONTEXTS, dtype=torch.long), previous, generator())
    q = expected(name, noise, weight, bias, hidden, previous)
    assert sample.ids.shape == (CONTEXTS, size)
    for ids, log_expected, p in zip(sample.ids, sample.log_expected, q, strict=True):
        frequency = ids.bincount(minlength=V) / size
        assert ((frequency - p).abs() <= 5 * (p * (1 - p) / size).sqrt() + 3 / size).all()
        torch.testing.assert_close(log_expected.double(), (size * p)[ids].log(), rtol=1e-4, atol=1e-4)


@for_every_noise
def test_draws_of_a_token_are_independent(name):
    """The pairs of its first two draws follow the product of the probabilities."""
    size, noise, (hidden, previous), (weight, bias) = 40_000, build(name, 2), contexts(), table()
    noise.refresh(weight, bias)
    q = expected(name, noise, weight, bias, hidden, previous)[0]
    target = torch.zeros(size, dtype=torch.long)
    ids = noise.draw(hidden[:1].expand(size, -1), target, previous[:1].expand(size), generator()).ids
    common = q.argsort(descending=True)[:10]
    for one in common:
        for other in common:
            frequency = ((ids[:, 0] == one) & (ids[:, 1] == other)).double().mean()
            p = q[one] * q[other]
            assert (frequency - p).abs() <= 5 * (p / size).sqrt() + 1 / size


@for_every_follower
def test_the_table_is_followed_at_refresh_only(name):
    noise, (hidden, previous), (weight, bias) = build(name), contexts(), table()
    untouched = probability(noise, hidden, previous, 4)
    torch.testing.assert_close(untouched, torch.full_like(untouched, 1 / V), rtol=1e-4, atol=0)  # of a table of zeros
    noise.refresh(weight, bias)
    before = probability(noise, hidden, previous, 4)
    weight.mul_(-3)
    assert torch.equal(probability(noise, hidden, previous, 4), before)
    noise.refresh(weight, bias)
    assert not torch.allclose(probability(noise, hidden, previous, 4), before, rtol=0.1)


@for_every_follower
def test_contexts_differ(name):
    noise, (hidden, previous), (weight, bias) = build(name), contexts(), table()
    noise.refresh(weight, bias)
    q = probability(noise, hidden, previous, 4)
    assert (q[0] - q[1]).abs().sum() > 0.1


@for_every_follower
def test_a_sharp_context_leaves_every_word_something(name):
    noise, (weight, _) = build(name), table()
    noise.refresh(weight, torch.linspace(0, -200, V))
    sample = noise.draw(1e4 * torch.randn(V, D), torch.arange(V), None, generator())
    assert sample.target_log_expected.isfinite().all() and sample.log_expected.isfinite().all()


@pytest.mark.parametrize("name", [*OF_CONTEXTS, "in_batch"])
def test_half_precision_casts_leave_what_is_drawn_and_said_in_step(name):
    noise, (hidden, previous), (weight, bias) = build(name).bfloat16(), contexts(), table()
    noise.refresh(weight.bfloat16(), bias.bfloat16())
    if name != "in_batch":
        q = probability(noise, hidden.bfloat16(), previous, 4)
        torch.testing.assert_close(q.sum(1), torch.ones(CONTEXTS, dtype=torch.float64), rtol=1e-3, atol=0)
    else:
        assert torch.equal(noise.gap, build(name).gap)


# -- bigrams ----------------------------------------------------------------------------------------------------------


def test_several_alias_tables_in_a_row_hold_exactly_each_words_mass():
    """The first word of the first has just one column's mass: it must not be filled from."""
    masses = [[4, 2, 9, 1], [4], [1, 1, 10, 4], [4, 4], [3, 5]]
    mass = torch.tensor([m * COLUMN // 4 for row in masses for m in row])
    threshold, alias = ops.alias_columns(mass)
    held = threshold.clone().index_add_(0, alias, COLUMN - threshold)
    assert torch.equal(held, mass)
    row = torch.tensor([i for i, row in enumerate(masses) for _ in row])
    shared = threshold < COLUMN
    assert torch.equal(row[alias[shared]], row[shared])


@pytest.mark.parametrize(
    "bigrams, message",
    [
        (None, "=None: .* bigrams=text"),
        ("nowhere.npy", "='nowhere.npy': cannot be read"),
        (torch.tensor([[0, 150, 1]]), " is of another vocabulary: .* 0 to 150, but there are 150"),
        (torch.tensor([[-1, 3, 1]]), " is of another vocabulary"),
        (torch.tensor([[0, 3, 0]]), " has a count of 0"),
        (torch.zeros(0, 3, dtype=torch.long), r" has shape \[0, 3\]"),
        (torch.zeros(4, 2, dtype=torch.long), r" has shape \[4, 2\]"),
        (torch.zeros(4, 3), " has .* type torch.float32"),
    ],
)
def test_a_table_that_is_none_is_an_error(bigrams, message):
    with pytest.raises(ValueError, match=f"^bigrams{message}"):
        make_noise("bigram", COUNTS, 4, bigrams=bigrams)


def test_without_the_word_before_there_is_no_bigram():
    with pytest.raises(ValueError, match="^previous=None: noise=bigram"):
        build("bigram").draw(torch.zeros(1, D), torch.zeros(1, dtype=torch.long), None, generator())


def test_a_table_may_come_from_a_file(tmp_path):
    np.save(tmp_path / "bigrams.npy", BIGRAMS.numpy())
    other = make_noise("bigram", COUNTS, 4, bigrams=str(tmp_path / "bigrams.npy"))
    for one, two in zip(build("bigram").buffers(), other.buffers(), strict=True):
        assert torch.equal(one, two)


def test_the_power_is_the_back_offs():
    noise = make_noise("bigram", COUNTS, 1, power=0.0, bigrams=BIGRAMS)
    hidden, previous = torch.zeros(1, D), torch.tensor([1])
    torch.testing.assert_close(probability(noise, hidden, previous, 1), torch.full((1, V), 1 / V, dtype=torch.float64))


# -- pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 31, 32, 70])
def test_sums_of_squares_equal_the_squares(width):
    hidden, weight = torch.randn(5, width, dtype=torch.float64), torch.randn(11, width, dtype=torch.float64)
    factor = torch.rand(11, dtype=torch.float64)
    square = factor * (hidden @ weight.T) ** 2
    actual = sums_of_squares(hidden, block_statistics(weight, factor, 4))
    torch.testing.assert_close(actual, torch.stack([x.sum(1) for x in square.split(4, 1)], 1))


def test_columns_are_drawn_by_mass_and_empty_ones_never():
    mass = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0], [5.0, 0.0, 0.0, 0.0, 5.0]])
    random = uniform((20_000,), generator(), mass.device)
    column = choose_columns(mass, torch.tensor([0, 1]).repeat_interleave(10_000), random).view(2, -1)
    frequency = torch.stack([row.bincount(minlength=5) for row in column]) / 10_000
    torch.testing.assert_close(frequency, mass / mass.sum(1, keepdim=True), rtol=0, atol=0.02)
    assert not frequency[mass == 0].any()


def test_a_codebook_finds_separate_groups():
    centre = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    group = torch.arange(4).repeat_interleave(25)
    vectors = centre[group] + 0.1 * torch.randn(100, 2)
    codebook, code = fit_codebook(vectors, torch.zeros(4, 2), 10)
    for g in range(4):
        assert len(code[group == g].unique()) == 1
    for codeword in code.unique():
        torch.testing.assert_close(codebook[codeword], vectors[code == codeword].mean(0))


# -- what cannot be had -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*OF_CONTEXTS, "in_batch"])
def test_without_replacement_is_an_error(name):
    with pytest.raises(ValueError, match=f"^replacement=False: noise={name}"):
        make_noise(name, COUNTS, 4, hidden_size=D, bigrams=BIGRAMS, replacement=False)


@pytest.mark.parametrize("name", [*FOLLOWERS, "in_batch"])
def test_a_power_of_nothing_is_an_error(name):
    with pytest.raises(ValueError, match=f"^power=0.75: noise={name}"):
        make_noise(name, COUNTS, 4, hidden_size=D, power=0.75)


@pytest.mark.usefixtures("without_type_checks")
def test_an_unknown_noise_is_an_error():
    with pytest.raises(ValueError, match="^noise='zipf': choose one of uniform, .* midx"):
        make_noise("zipf", COUNTS, 4)
