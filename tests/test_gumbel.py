"""Gumbel sampling against exact probabilities: fixed numbers of draws, bounds from the standard error."""

import itertools
import math

import pytest
import torch
from cases import assert_close

from lvsoftmax.ops.gumbel import gumbel_argmax, gumbel_perturbed, gumbel_softmax, gumbel_topk

DRAWS = 40_000
LOGITS = torch.tensor([1.2, 0.0, -0.7, 0.4])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_frequencies(outcomes, expected):
    """Each probability within four standard errors of its frequency."""
    frequency = torch.bincount(outcomes, minlength=len(expected)) / len(outcomes)
    standard_error = (expected * (1 - expected) / len(outcomes)).sqrt()
    assert ((frequency - expected).abs() <= 4 * standard_error + 1e-9).all()


def test_the_noise_is_standard_gumbel():
    noise = gumbel_perturbed(torch.zeros(DRAWS), generator())
    assert noise.mean().item() == pytest.approx(0.57722, abs=4 * math.pi / math.sqrt(6 * DRAWS))
    for bound in (-1.0, 0.0, 1.0, 3.0):
        below = math.exp(-math.exp(-bound))
        share = (noise <= bound).double().mean().item()
        assert share == pytest.approx(below, abs=4 * math.sqrt(below * (1 - below) / DRAWS))


@pytest.mark.parametrize("dim", [0, 1])
def test_the_largest_is_a_draw_from_the_softmax(dim):
    rows = LOGITS.expand(DRAWS, -1)
    drawn = gumbel_argmax(rows if dim == 1 else rows.T, generator(), dim)
    assert_frequencies(drawn, LOGITS.softmax(0))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_topk_follows_plackett_and_luce(k):
    """Every ordered draw without replacement against its exact probability."""
    drawn = gumbel_topk(LOGITS.expand(DRAWS, -1), k, generator())
    assert all(len(set(row)) == k for row in drawn[:100].tolist())
    p = LOGITS.double().softmax(0).tolist()
    orders = list(itertools.permutations(range(4), k))
    expected = []
    for order in orders:
        probability, left = 1.0, 1.0
        for i in order:
            probability *= p[i] / left
            left -= p[i]
        expected.append(probability)
    assert sum(expected) == pytest.approx(1)
    place = {order: number for number, order in enumerate(orders)}
    outcomes = torch.tensor([place[tuple(row)] for row in drawn.tolist()])
    assert_frequencies(outcomes, torch.tensor(expected))


def test_topk_along_another_dimension():
    across = gumbel_topk(LOGITS.expand(5, 3, -1).mT, 2, generator(), dim=1)
    assert across.shape == (5, 2, 3)


def test_what_has_no_weight_comes_last():
    log_weight = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, 0.0]).expand(200, -1)
    assert set(gumbel_argmax(log_weight, generator()).tolist()) == {1, 3, 4}
    order = gumbel_topk(log_weight, 5, generator())
    assert set(order[:, :3].flatten().tolist()) == {1, 3, 4}


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_soft_draw_of_two_is_a_logistic_squashed(temperature):
    """``y_1 <= t`` where ``(z_1 - z_2 + logistic) / T <= logit(t)``: the distribution function in closed form."""
    logits = torch.tensor([0.8, -0.3])
    share = gumbel_softmax(logits.expand(DRAWS, -1), temperature, generator=generator())[:, 0]
    for bound in (0.05, 0.3, 0.5, 0.9):
        expected = 1 / (1 + math.exp(-(temperature * math.log(bound / (1 - bound)) - 1.1)))
        found = (share <= bound).double().mean().item()
        assert found == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / DRAWS))


@pytest.mark.parametrize("dim", [0, 1])
def test_a_soft_draw_is_a_distribution_whose_largest_is_a_draw(dim):
    rows = LOGITS.expand(DRAWS, -1)
    soft = gumbel_softmax(rows if dim == 1 else rows.T, 0.5, dim=dim, generator=generator())
    assert_close(soft.sum(dim), torch.ones(DRAWS), 1e-5)
    assert_frequencies(soft.argmax(dim), LOGITS.softmax(0))


@pytest.mark.parametrize("dim", [0, -1])
def test_straight_through_is_hard_in_value_and_soft_in_gradient(dim):
    logits = torch.randn(60, 60, requires_grad=True)  # enough for a sum that rounds to show
    hard = gumbel_softmax(logits, 0.7, hard=True, dim=dim, generator=generator(1))
    soft = gumbel_softmax(logits, 0.7, dim=dim, generator=generator(1))
    assert torch.equal(hard, (soft == soft.amax(dim, keepdim=True)).float())
    upstream = torch.randn(60, 60)
    assert torch.equal(*(torch.autograd.grad(y, logits, upstream)[0] for y in (hard, soft)))


def test_gradients_of_a_soft_draw():
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def run(z):
        return gumbel_softmax(z, 0.7, generator=generator(2))

    assert torch.autograd.gradcheck(run, logits)
    assert torch.autograd.gradgradcheck(run, logits)


def test_a_cold_draw_is_finite():
    cold = gumbel_softmax(1e4 * torch.randn(50, 4), 1e-38, generator=generator())
    assert torch.equal(cold.sort(1).values, torch.tensor([0.0, 0, 0, 1]).expand(50, -1))


def test_every_draw_has_its_own_generator():
    rows = LOGITS.expand(100, -1)
    draws = (
        lambda g: gumbel_argmax(rows, g),
        lambda g: gumbel_topk(rows, 2, g),
        lambda g: gumbel_softmax(rows, generator=g),
    )
    for draw in draws:
        before = torch.get_rng_state()
        assert torch.equal(draw(generator(3)), draw(generator(3)))
        assert not torch.equal(draw(generator(3)), draw(generator(4)))
        assert torch.equal(torch.get_rng_state(), before)
        draw(None)
        assert not torch.equal(torch.get_rng_state(), before)


def test_precisions():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert gumbel_softmax(LOGITS.to(dtype)).dtype == gumbel_perturbed(LOGITS.to(dtype)).dtype == expected


def test_bad_input_is_named():
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"temperature={temperature}: must be a positive finite number"):
            gumbel_softmax(LOGITS, temperature)
    for k in (-1, 5):
        with pytest.raises(ValueError, match=f"k={k}: must be between 0 and the 4"):
            gumbel_topk(LOGITS, k)
