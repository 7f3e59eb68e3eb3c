"""What the sigsoftmax promises beyond the laws: its limits, its rank, its start."""

import math

import pytest
import torch
from cases import COUNTS, assert_close, randomise

from lvsoftmax.layers.full_softmax import FullSoftmax
from lvsoftmax.layers.sig_softmax import SigSoftmax

D = 4


def test_worked_numbers():
    layer = SigSoftmax(1, torch.tensor([3, 2, 1]), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0], [1.0], [-1.0]]) * math.log(2))
    p = layer.log_prob(torch.ones(1, 1)).exp()  # exp(s) sigmoid(s) is 1/2, 4/3 and 1/6
    assert_close(p, torch.tensor([[3 / 12, 8 / 12, 1 / 12]]), 1e-6)


@pytest.mark.parametrize(("shift", "temperature"), [(60.0, 1.0), (-60.0, 0.5)])
def test_far_from_zero_it_is_a_softmax(shift, temperature):
    sig, full = SigSoftmax(D, COUNTS).double(), FullSoftmax(D, COUNTS, temperature=temperature).double()
    with torch.no_grad():
        sig.bias.copy_(torch.randn(len(COUNTS)) + shift)
        full.weight, full.bias = sig.weight, sig.bias
    hidden, target = torch.randn(5, D, dtype=torch.float64), torch.randint(len(COUNTS), (5,))
    assert_close(sig.log_prob(hidden), full.log_prob(hidden), 1e-12)
    assert_close(sig.nll(hidden, target), full.nll(hidden, target), 1e-12)


def test_it_breaks_the_softmax_bottleneck():
    """Yang et al. 2018: the matrix of log-probabilities of a softmax has rank D + 1 at most, bias included D + 2."""
    hidden = torch.randn(60, D, dtype=torch.float64)
    ranks = {}
    for layer_class in (SigSoftmax, FullSoftmax):
        layer = randomise(layer_class(D, COUNTS).double(), scale=1.0)
        ranks[layer_class] = torch.linalg.matrix_rank(layer.log_prob(hidden), rtol=1e-10).item()
    assert ranks[FullSoftmax] == D + 2
    assert ranks[SigSoftmax] > 3 * ranks[FullSoftmax]


def test_a_word_of_average_frequency_starts_at_zero():
    assert_close(SigSoftmax(D, torch.full((50,), 7)).bias.detach(), torch.zeros(50), 1e-6)
    bias = SigSoftmax(D, COUNTS).bias
    above_average = (COUNTS + 1) / (COUNTS + 1).sum() > 1 / len(COUNTS)
    assert torch.equal(bias > 0, above_average)


def test_the_partition_is_the_sum_of_the_weights():
    layer = randomise(SigSoftmax(D, COUNTS))
    hidden = torch.randn(5, D)
    logits = layer.logits(hidden)
    assert_close(layer.log_partition(hidden), (logits.exp() * logits.sigmoid()).sum(1).log(), 1e-5)
