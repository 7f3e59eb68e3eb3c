"""What the spherical softmax promises beyond the laws: its symmetries, its floor, its start, its errors."""

import math

import pytest
import torch
from cases import COUNTS, assert_close, randomise

from lvsoftmax.layers.spherical_softmax import SphericalSoftmax
from lvsoftmax.layers.taylor_softmax import TaylorSoftmax

D = 8


def test_worked_numbers():
    layer = SphericalSoftmax(1, torch.tensor([3, 2, 1]), bias=False, epsilon=1.0)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0], [-1.0], [0.0]]))
    p = layer.log_prob(torch.tensor([[1.0], [3.0]])).exp()
    assert_close(p, torch.tensor([[5 / 8, 2 / 8, 1 / 8], [37 / 48, 10 / 48, 1 / 48]]), 1e-6)


def test_the_sign_of_the_hidden_vector_does_not_matter_without_a_bias():
    layer = SphericalSoftmax(D, COUNTS, bias=False)
    hidden = torch.randn(5, D)
    assert_close(layer.log_prob(-hidden), layer.log_prob(hidden), 0.0)


def test_scaling_the_hidden_vector_leads_to_the_ratio_of_squares():
    layer = SphericalSoftmax(D, COUNTS, bias=False).double()
    hidden = torch.randn(5, D, dtype=torch.float64)
    squares = layer.logits(hidden).square()
    limit = squares / squares.sum(1, keepdim=True)
    distance = [(layer.log_prob(scale * hidden).exp() - limit).abs().max().item() for scale in (10, 100, 1000)]
    assert distance[0] > 50 * distance[1] > 2500 * distance[2]  # falls as epsilon / scale^2


def test_epsilon_is_the_floor():
    layer = randomise(SphericalSoftmax(D, COUNTS, epsilon=0.5).double(), scale=1.0)
    hidden = torch.randn(5, D, dtype=torch.float64)
    total = (layer.logits(hidden).square() + 0.5).sum(1, keepdim=True)
    assert (layer.log_prob(hidden).exp() >= 0.5 / total).all()


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 2.0])
def test_the_rarest_word_starts_where_its_slope_is_largest(epsilon):
    layer = SphericalSoftmax(D, COUNTS, epsilon=epsilon)
    assert layer.bias.min().item() == pytest.approx(math.sqrt(epsilon), rel=1e-5)
    assert (layer.bias.diff() <= 0).all()


def test_at_epsilon_one_it_is_the_taylor_softmax_one_to_the_left():
    spherical, taylor = SphericalSoftmax(D, COUNTS, epsilon=1.0), TaylorSoftmax(D, COUNTS)
    taylor.load_state_dict({"weight": spherical.weight, "bias": spherical.bias - 1})
    hidden, target = torch.randn(5, D), torch.randint(len(COUNTS), (5,))
    assert_close(taylor.log_prob(hidden), spherical.log_prob(hidden), 1e-5)
    assert_close(taylor.nll(hidden, target), spherical.nll(hidden, target), 1e-5)


def test_the_partition_is_the_sum_of_the_weights():
    layer = randomise(SphericalSoftmax(D, COUNTS, epsilon=0.3))
    hidden = torch.randn(5, D)
    assert_close(layer.log_partition(hidden), (layer.logits(hidden).square() + 0.3).sum(1).log(), 1e-5)


@pytest.mark.parametrize("epsilon", [0.0, -0.1, math.nan, math.inf])
def test_bad_epsilons_are_named(epsilon):
    with pytest.raises(ValueError, match=f"^epsilon={epsilon}: must be a positive finite number$"):
        SphericalSoftmax(D, COUNTS, epsilon=epsilon)
