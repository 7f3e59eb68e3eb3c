"""The blocked cross-entropy of any normaliser against the plain formula, on sizes that fit nothing."""

import pytest
import torch
import torch.nn.functional as F
from cases import assert_close
from test_linear_cross_entropy import LargestResult

from lvsoftmax.ops.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_loss,
    normalised_cross_entropy,
    normalised_cross_entropy_loss,
    reference,
)
from lvsoftmax.ops.normalisers import Exponential, Sigmoidal, Spherical, Taylor, log_normalise

N, D, V = 11, 3, 13

for_every_normaliser = pytest.mark.parametrize(
    "normaliser", [Exponential(), Spherical(0.3), Spherical(1e-4), Taylor(), Sigmoidal()], ids=str
)


@pytest.fixture(autouse=True)
def blocks_of_four_tokens(monkeypatch):
    """Several blocks, the last of them shorter."""
    monkeypatch.setattr(reference, "BLOCK", 8 * V)
    monkeypatch.setattr(reference, "FEWEST", 4)


def operands(dtype=torch.float64, tokens=N):
    hidden, weight, bias = (
        torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((tokens, D), (V, D), (V,))
    )
    return hidden, weight, bias, torch.randint(V, (tokens,))


def plain(hidden, weight, bias, target, normaliser):
    log_p = log_normalise(F.linear(hidden, weight, bias), normaliser)
    return -log_p.gather(1, target[:, None]).squeeze(1)


def some_zero(tokens=N):
    upstream = torch.randn(tokens, dtype=torch.float64)
    upstream[::3] = 0
    return upstream


@for_every_normaliser
def test_per_token_values_and_gradients(normaliser):
    *tensors, target = operands()
    actual = normalised_cross_entropy(*tensors, target, normaliser)
    expected = plain(*tensors, target, normaliser)
    upstream = some_zero()
    assert_close(actual, expected, 1e-12)
    assert_close(*(torch.autograd.grad(nll, tensors, upstream) for nll in (actual, expected)), 1e-12)


@for_every_normaliser
def test_weighted_sum_and_gradients(normaliser):
    *tensors, target = operands()
    weight = some_zero().requires_grad_()
    actual = normalised_cross_entropy_loss(*tensors, target, weight, normaliser)
    expected = (weight * plain(*tensors, target, normaliser)).sum()
    upstream = torch.tensor(-2.5, dtype=torch.float64)
    assert_close(actual, expected, 1e-12)
    assert_close(*(torch.autograd.grad(loss, [*tensors, weight], upstream) for loss in (actual, expected)), 1e-12)


def test_the_exponential_is_the_softmax():
    *tensors, target = operands()
    weight = some_zero()
    losses = (
        normalised_cross_entropy_loss(*tensors, target, weight, Exponential()),
        linear_cross_entropy_loss(*tensors, target, weight),
    )
    assert_close(*losses, 1e-13)
    assert_close(*(torch.autograd.grad(loss, tensors) for loss in losses), 1e-13)
    assert_close(
        normalised_cross_entropy(*tensors, target, Exponential()), linear_cross_entropy(*tensors, target), 1e-13
    )


@pytest.mark.parametrize("wanted", range(4))
def test_one_gradient_alone_and_without_bias(wanted):
    hidden, weight, bias, target = operands()
    token_weight = some_zero().requires_grad_()
    variables = [hidden, weight, bias, token_weight]
    for i, variable in enumerate(variables):
        variable.requires_grad_(i == wanted)
    for given in (bias, None):
        if variables[wanted] is bias and given is None:
            continue
        nll = plain(hidden, weight, given, target, Taylor())
        loss = normalised_cross_entropy_loss(hidden, weight, given, target, token_weight, Taylor())
        expected = torch.autograd.grad((token_weight * nll).sum(), variables[wanted], retain_graph=True)
        assert_close(torch.autograd.grad(loss, variables[wanted]), expected, 1e-12)
        if wanted < 3:
            actual = normalised_cross_entropy(hidden, weight, given, target, Taylor())
            expected = torch.autograd.grad(nll.sum(), variables[wanted])
            assert_close(torch.autograd.grad(actual.sum(), variables[wanted]), expected, 1e-12)


@for_every_normaliser
def test_no_tokens(normaliser):
    *tensors, target = operands(tokens=0)
    assert normalised_cross_entropy(*tensors, target, normaliser).shape == (0,)
    loss = normalised_cross_entropy_loss(*tensors, target, torch.ones(0, dtype=torch.float64), normaliser)
    assert loss == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, tensors))


def test_the_weighted_sum_is_differentiated_once():
    *tensors, target = operands()
    loss = normalised_cross_entropy_loss(*tensors, target, some_zero(), Taylor())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="use the per-token nll"):
        loss.backward()


def test_no_array_holds_a_score_per_token_and_word():
    *tensors, target = operands()
    ones = torch.ones(N, dtype=torch.float64)
    for normaliser in (Spherical(0.1), Taylor(), Sigmoidal()):
        with LargestResult() as largest:
            normalised_cross_entropy(*tensors, target, normaliser).sum().backward()
            normalised_cross_entropy_loss(*tensors, target, ones, normaliser).backward()
        assert largest.entries == max(reference.BLOCK // 2, V * D) < N * V


# -- digits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [0.3, 12.0, 60.0, 1e4, 1e9, -30.0, -200.0])
@for_every_normaliser
def test_gradients_keep_their_digits_as_p_goes_to_one(normaliser, largest):
    """One score far above the others, or far below them in what the exponentials see."""
    scores = torch.tensor([[largest, 1e-3, -2e-3, 5e-4]])
    if largest < 0:
        scores[:, 1:] += 2 * largest
    target = torch.tensor([0])
    exact = scores.double().requires_grad_()
    found = scores.clone().requires_grad_()
    identity = torch.eye(4)
    nll = normalised_cross_entropy(found, identity, None, target, normaliser)
    (gradient,) = torch.autograd.grad(nll, found)
    others = torch.logsumexp(normaliser.log_weight(exact[:, 1:]), 1)
    truth = F.softplus(others - normaliser.log_weight(exact[:, 0]), threshold=1e9)
    (expected,) = torch.autograd.grad(truth, exact)
    smallest = torch.finfo(torch.float32).smallest_normal
    torch.testing.assert_close(nll.double(), truth, rtol=1e-4, atol=smallest)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max() + smallest)
    torch.testing.assert_close(gradient[:, 0].double(), expected[:, 0], rtol=1e-4, atol=smallest)


@for_every_normaliser
def test_nothing_overflows(normaliser):
    big = 1e38  # three times that is still a number
    scores = torch.tensor([[big, -big, 0.0], [-big, -big, -big], [big, big, -1.0], [0.0, 1e-30, -1e-38]])
    for target in range(3):
        x = scores.clone().requires_grad_()
        nll = normalised_cross_entropy(x, torch.eye(3), None, torch.full((4,), target), normaliser)
        (gradient,) = torch.autograd.grad(nll[nll.isfinite()].sum(), x)
        assert not nll.isnan().any() and gradient.isfinite().all()
        exact = plain(scores.double(), torch.eye(3).double(), None, torch.full((4,), target), normaliser)
        assert_close(nll.double(), exact, 1e-5)
