"""Normalisers against their formulas: worked numbers, identities, Jacobian products, huge scores."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from cases import assert_close, zipf_counts

from lvsoftmax.layer import unigram_log_prob
from lvsoftmax.ops import normalisers
from lvsoftmax.ops.normalisers import (
    Exponential,
    Sigmoidal,
    Spherical,
    Taylor,
    divide_by_sum,
    log_divide_by_sum,
    log_normalise,
    normalise,
)

WEIGHTS = {
    Exponential(): np.exp,
    Spherical(0.3): lambda x: x**2 + 0.3,
    Spherical(1e-6): lambda x: x**2 + 1e-6,
    Taylor(): lambda x: 1 + x + x**2 / 2,
    Sigmoidal(): lambda x: np.exp(x) / (1 + np.exp(-x)),
}

for_every_normaliser = pytest.mark.parametrize("normaliser", WEIGHTS, ids=str)


def scores(*shape):
    return 2 * torch.randn(shape, dtype=torch.float64)


# -- the formulas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dim"), [((5,), 0), ((2, 3), 0), ((2, 3, 4), 1), ((2, 3, 4), -1)])
@for_every_normaliser
def test_probabilities_are_weights_over_their_sum(normaliser, shape, dim):
    x = scores(*shape)
    weight = torch.from_numpy(WEIGHTS[normaliser](x.numpy()))
    expected = weight / weight.sum(dim, keepdim=True)
    assert_close(normaliser.log_weight(x), weight.log(), 1e-13)
    assert_close(normalise(x, normaliser, dim), expected, 1e-13)
    assert_close(log_normalise(x, normaliser, dim), expected.log(), 1e-12)


def test_worked_numbers():
    x = torch.tensor([2.0, -1.0, 0.0])
    assert normalise(x, Spherical(1.0)).tolist() == pytest.approx([5 / 8, 2 / 8, 1 / 8])
    assert normalise(x, Taylor()).tolist() == pytest.approx([5 / 6.5, 0.5 / 6.5, 1 / 6.5])
    third = torch.tensor([0.0, math.log(2), -math.log(2)])  # exp(x) sigmoid(x) = 1/2, 4/3, 1/6
    assert normalise(third, Sigmoidal()).tolist() == pytest.approx([3 / 12, 8 / 12, 1 / 12])


def test_the_taylor_softmax_is_a_spherical_one_about_minus_one():
    x = scores(4, 5)
    assert_close(normalise(x, Taylor()), normalise(x + 1, Spherical(1.0)), 1e-13)


def test_the_sigsoftmax_is_a_softmax_far_from_zero():
    x = scores(4, 5)
    assert_close(normalise(x + 60, Sigmoidal()), x.softmax(1), 1e-12)
    assert_close(normalise(x - 60, Sigmoidal()), (2 * x).softmax(1), 1e-12)


def test_what_changes_nothing():
    x = scores(4, 5)
    assert_close(normalise(-x, Spherical(0.3)), normalise(x, Spherical(0.3)), 0.0)
    assert_close(normalise(3 * x, Spherical(9 * 0.3)), normalise(x, Spherical(0.3)), 1e-13)
    assert_close(normalise(3 * x, Spherical(1e-20)), normalise(x, Spherical(1e-20)), 1e-13)
    assert_close(divide_by_sum(3 * x.abs()), divide_by_sum(x.abs()), 1e-13)


# -- derivatives ------------------------------------------------------------------------------------------------------


@for_every_normaliser
def test_the_slope_is_the_derivative_of_the_log_weight(normaliser):
    x = torch.cat([scores(20), torch.zeros(1)]).requires_grad_()
    (expected,) = torch.autograd.grad(normaliser.log_weight(x).sum(), x)
    assert_close(normaliser.slope(x).detach(), expected, 1e-12)
    assert torch.autograd.gradcheck(normaliser.slope, x)


@for_every_normaliser
def test_differentiable_twice(normaliser):
    x = scores(2, 3).requires_grad_()
    for function in (normalise, log_normalise):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, normaliser), x)
        assert torch.autograd.gradgradcheck(lambda x, f=function: f(x, normaliser), x)


def true_jacobian(function, x, dim):
    rows = x.movedim(dim, -1)
    found = [torch.autograd.functional.jacobian(function, row) for row in rows.reshape(-1, rows.shape[-1])]
    return torch.stack(found).view(*rows.shape, rows.shape[-1])


@pytest.mark.parametrize("dim", [0, 1, -1])
@for_every_normaliser
def test_the_jacobian_and_its_products_from_either_side(normaliser, dim):
    x, v = scores(3, 4, 3), torch.randn(3, 4, 3, dtype=torch.float64)
    expected = true_jacobian(lambda row: normalise(row, normaliser), x, dim)
    row_v = v.movedim(dim, -1)
    assert_close(normalisers.jacobian(x, normaliser, dim), expected, 1e-13)
    right = normalisers.jvp(x, v, normaliser, dim).movedim(dim, -1)
    left = normalisers.vjp(x, v, normaliser, dim).movedim(dim, -1)
    assert_close(right, (expected @ row_v[..., None]).squeeze(-1), 1e-13)
    assert_close(left, (row_v[..., None, :] @ expected).squeeze(-2), 1e-13)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_the_jacobian_of_division_and_its_products(dim):
    x, v = scores(3, 4, 3).abs(), torch.randn(3, 4, 3, dtype=torch.float64)
    x[0, 0, 0] = 0
    expected = true_jacobian(divide_by_sum, x, dim)
    row_v = v.movedim(dim, -1)
    assert_close(normalisers.divide_by_sum_jacobian(x, dim), expected, 1e-13)
    right = normalisers.divide_by_sum_jvp(x, v, dim).movedim(dim, -1)
    left = normalisers.divide_by_sum_vjp(x, v, dim).movedim(dim, -1)
    assert_close(right, (expected @ row_v[..., None]).squeeze(-1), 1e-13)
    assert_close(left, (row_v[..., None, :] @ expected).squeeze(-2), 1e-13)


@for_every_normaliser
def test_weighing_gives_the_weights_and_their_derivatives_up_to_scale(normaliser):
    x = torch.cat([scores(4, 5), scores(4, 5) + 30, scores(4, 5) - 30])
    weight, derivative, log_scale = normaliser.weigh(x.clone())
    expected = torch.from_numpy(WEIGHTS[normaliser](x.numpy()))
    assert log_scale.shape == (12, 1)
    assert_close(weight * log_scale.exp() / expected, torch.ones_like(expected), 1e-12)
    assert_close(derivative / weight, normaliser.slope(x), 1e-12)
    assert (weight.amax(1) <= 1 + 1e-12).all() and (weight.amax(1) >= 0.5).all()


@pytest.mark.parametrize("size", [88.0, 103.0, 104.0, 200.0, 1e4, 1e37])
@for_every_normaliser
def test_weighing_does_not_overflow(normaliser, size):
    x = torch.tensor([[1.0, 0.75, 0.0, -1.0], [1.0, 1.0, 1.0, 1.0], [-0.5, -1.0, -1.0, -0.75]]) * size
    weight, derivative, log_scale = normaliser.weigh(x.clone())
    expected = normaliser.log_weight(x.double())
    assert weight.isfinite().all() and derivative.isfinite().all() and log_scale.isfinite().all()
    assert_close(weight.double(), (expected - log_scale.double()).exp(), 1e-5 + 1e-7 * min(size, 1e4))


# -- any score --------------------------------------------------------------------------------------------------------


@for_every_normaliser
def test_scores_of_any_size(normaliser):
    x = torch.tensor([[3e38, -3e38, 0.0], [3e38, 3e38, 3e38], [-3e38, -1e38, -3e38], [1e-38, 0.0, -1e-38]])
    x.requires_grad_()
    log_p = log_normalise(x, normaliser)
    assert not log_p.isnan().any() and (log_p <= 0).all()
    assert_close(log_p[1].exp(), torch.full((3,), 1 / 3), 1e-6)
    (gradient,) = torch.autograd.grad(log_p[:, 0].sum(), x)
    assert gradient.isfinite().all() and normaliser.slope(x).isfinite().all()


@for_every_normaliser
def test_precisions(normaliser):
    x = scores(3, 1000)
    for function in (normalise, log_normalise):
        assert function(x, normaliser).dtype == torch.float64
        assert function(x.float(), normaliser).dtype == torch.float32
        rounded = function(x.bfloat16(), normaliser)
        assert rounded.dtype == torch.float32
        assert torch.equal(rounded, function(x.bfloat16().float(), normaliser))
    assert normaliser.slope(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("size", [2, 97, 30_000])
@for_every_normaliser
def test_scores_have_the_distribution_asked_for(normaliser, size):
    log_prob = unigram_log_prob(zipf_counts(size)).double().log_softmax(0)
    found = normaliser.scores(log_prob)
    assert_close(log_normalise(found, normaliser), log_prob, 1e-9)
    assert (found.diff() <= 0).all()
    rows = torch.stack([log_prob, log_prob.flip(0)])
    assert_close(log_normalise(normaliser.scores(rows), normaliser), rows, 1e-9)


def test_which_scores():
    rare = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert Spherical(0.04).scores(rare)[-1].item() == pytest.approx(0.2)
    assert Taylor().scores(rare)[-1].item() == pytest.approx(0, abs=1e-6)
    assert_close(Sigmoidal().scores(torch.full((4,), 0.25).log()), torch.zeros(4), 1e-6)
    assert torch.equal(Exponential().scores(rare), rare)


@for_every_normaliser
def test_a_normaliser_is_a_value(normaliser):
    assert copy.deepcopy(normaliser) == pickle.loads(pickle.dumps(normaliser)) == normaliser


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf])
def test_bad_epsilons_are_named(epsilon):
    with pytest.raises(ValueError, match=f"epsilon={epsilon}: must be a positive finite number"):
        Spherical(epsilon)


# -- division by the sum ----------------------------------------------------------------------------------------------


def test_division_by_the_sum():
    x = torch.tensor([2.0, 4.0, 2.0, 1.0])
    assert divide_by_sum(x).tolist() == pytest.approx((0.2222, 0.4444, 0.2222, 0.1111), abs=5e-5)
    assert_close(log_divide_by_sum(x), divide_by_sum(x).log(), 1e-6)
    table = torch.tensor([[1.0, 0.0], [3.0, 5.0]])
    assert_close(divide_by_sum(table, 0), torch.tensor([[0.25, 0.0], [0.75, 1.0]]), 1e-7)
    assert_close(log_divide_by_sum(table, 0)[0, 1], torch.tensor(-math.inf), 0.0)
    assert divide_by_sum(torch.zeros(0, 3)).shape == (0, 3)


def test_division_takes_scores_of_any_size():
    for size in (3e38, 1e-38):
        assert_close(divide_by_sum(torch.full((4,), size)), torch.full((4,), 0.25), 1e-6)
    assert divide_by_sum(torch.ones(3).bfloat16()).dtype == torch.float32


def test_division_is_differentiable_twice():
    x = scores(2, 3).abs().requires_grad_()
    for function in (divide_by_sum, log_divide_by_sum):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("function", [divide_by_sum, log_divide_by_sum, normalisers.divide_by_sum_jacobian])
def test_what_cannot_be_divided_by_its_sum_is_named(function):
    for x, message in (
        ([-0.25, 1, -0.75], "a score is -0.25: scores must be finite and not negative"),
        ([1.0, -1e-30, 2.0], "a score is -1e-30"),
        ([1.0, math.nan], "a score is nan"),
        ([1.0, math.inf], "a score is inf"),
        ([0.0, 0.0], "all scores of a distribution are zero"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            function(torch.tensor(x))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="all scores"):
        function(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), 0)
