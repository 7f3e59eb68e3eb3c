"""What the Taylor softmax promises beyond the laws: its polynomial, its minimum, its start, the softmax it is near."""

import pytest
import torch
from cases import COUNTS, assert_close, randomise

from lvsoftmax.layers.full_softmax import FullSoftmax
from lvsoftmax.layers.taylor_softmax import TaylorSoftmax

D = 8


def test_worked_numbers():
    layer = TaylorSoftmax(1, torch.tensor([3, 2, 1]), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0], [-1.0], [0.0]]))
    p = layer.log_prob(torch.tensor([[1.0], [-1.0]])).exp()
    assert_close(p, torch.tensor([[5 / 6.5, 0.5 / 6.5, 1 / 6.5], [1 / 4.5, 2.5 / 4.5, 1 / 4.5]]), 1e-6)


def test_about_zero_it_is_a_softmax_to_second_order():
    taylor, full = TaylorSoftmax(D, COUNTS, bias=False).double(), FullSoftmax(D, COUNTS, bias=False).double()
    full.weight = taylor.weight
    hidden = torch.randn(5, D, dtype=torch.float64)
    gap = [(taylor.log_prob(s * hidden) - full.log_prob(s * hidden)).abs().max().item() for s in (1e-1, 1e-2, 1e-3)]
    for larger, smaller in zip(gap, gap[1:], strict=False):
        assert larger / smaller == pytest.approx(1000, rel=0.3)  # the first term left out is of the third order


def test_a_word_is_least_likely_at_minus_one():
    layer = TaylorSoftmax(1, torch.tensor([1, 1]), bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [0.0]]))
    hidden = torch.linspace(-4, 2, 61, dtype=torch.float64)[:, None]
    assert hidden[layer.log_prob(hidden)[:, 0].argmin()].item() == pytest.approx(-1)


def test_the_rarest_word_starts_at_zero():
    layer = TaylorSoftmax(D, COUNTS)
    assert layer.bias.min().item() == pytest.approx(0, abs=1e-5)
    assert (layer.bias.diff() <= 0).all()


def test_the_partition_is_the_sum_of_the_weights():
    layer = randomise(TaylorSoftmax(D, COUNTS))
    hidden = torch.randn(5, D)
    logits = layer.logits(hidden)
    assert_close(layer.log_partition(hidden), (1 + logits + logits.square() / 2).sum(1).log(), 1e-5)
