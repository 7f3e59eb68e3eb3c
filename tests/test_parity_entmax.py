"""Parity with the authors' package, ``pip install -e '.[parity]'``: forward and backward to float32's rounding."""

import pytest
import torch
from cases import assert_close

from lvsoftmax.ops.linear_cross_entropy.entmax import linear_entmax
from lvsoftmax.ops.sparse import entmax, entmax15, entmax_loss, sparsemax, sparsemax_loss

theirs = pytest.importorskip("entmax", reason="pip install entmax")

ALPHAS = [1.05, 1.3, 1.5, 1.7, 2.0, 2.5, 3.0]
ROUNDING = 1e-5
SIZES = [2, 97, 5003]


def operands(size, scale=1.0):
    logits = (scale * torch.randn(7, size)).requires_grad_()
    return logits, torch.randn(7, size), torch.randint(size, (7,))


def assert_same(ours, others, variables, upstream, tolerance=ROUNDING):
    assert_close(ours, others, tolerance)
    slopes = (torch.autograd.grad(value, variables, upstream) for value in (ours, others))
    assert_close(*slopes, tolerance)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_the_exact_maps(size, scale):
    logits, upstream, _ = operands(size, scale)
    assert_same(sparsemax(logits), theirs.sparsemax(logits), logits, upstream)
    assert_same(entmax15(logits), theirs.entmax15(logits), logits, upstream)
    for dim in (0, 1):
        assert_same(entmax15(logits, dim), theirs.entmax15(logits, dim), logits, upstream)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_any_alpha(alpha, size):
    logits, upstream, _ = operands(size)
    if alpha <= 2:  # beyond, slopes grow without bounds as a probability goes to 0, and with them what rounding does
        assert_same(entmax(logits, alpha), theirs.entmax_bisect(logits, alpha), logits, upstream, 5 * ROUNDING)
    logits, upstream = logits.detach().double().requires_grad_(), upstream.double()
    others = theirs.entmax_bisect(logits, alpha, n_iter=100)
    assert_same(entmax(logits, alpha), others, logits, upstream, 1e-6)


@pytest.mark.parametrize("size", [2, 97])
def test_derivatives_by_alpha(size):
    logits, upstream, _ = operands(size)
    logits, upstream = logits.detach().double(), upstream.double()
    alpha = torch.tensor([1.1, 1.3, 1.5, 1.7, 2.0, 2.5, 3.0], dtype=torch.float64)[:, None].requires_grad_()
    ours, others = entmax(logits, alpha), theirs.entmax_bisect(logits, alpha, n_iter=100)
    assert_close(ours, others, 1e-8)
    slopes = [torch.autograd.grad(value, alpha, upstream)[0] for value in (ours, others)]
    assert_close(*slopes, 1e-4)  # theirs hangs on what bisection leaves of the last entry


@pytest.mark.parametrize("size", SIZES)
def test_the_losses(size):
    logits, _, target = operands(size)
    upstream = torch.randn(7)
    for ours, others in (
        (sparsemax_loss(logits, target), theirs.sparsemax_loss(logits, target)),
        (entmax_loss(logits, target), theirs.entmax15_loss(logits, target)),
        *((entmax_loss(logits, target, a), theirs.entmax_bisect_loss(logits, target, a, 50)) for a in ALPHAS),
    ):
        assert_same(ours, others.squeeze(-1), logits, upstream, 3e-4 if size > 1000 else 1e-4)


def test_the_loss_of_a_linear_layer():
    hidden, weight, bias = torch.randn(7, 5), torch.randn(5003, 5), torch.randn(5003)
    variables = [x.requires_grad_() for x in (hidden, weight, bias)]
    target, upstream = torch.randint(5003, (7,)), torch.randn(7)
    for alpha, others in ((2.0, theirs.sparsemax_loss), (1.5, theirs.entmax15_loss)):
        logits = hidden @ weight.T + bias
        ours = linear_entmax(hidden, weight, bias, target, alpha)
        assert_same(ours, others(logits, target).squeeze(-1), variables, upstream)
