"""The Fenchel-Young losses by blocks against those of all logits at once."""

import pytest
import torch
import torch.nn.functional as F
from cases import LargestResult, assert_close

from lvsoftmax.ops.linear_cross_entropy import entmax, reference
from lvsoftmax.ops.linear_cross_entropy.entmax import linear_entmax, linear_entmax_loss
from lvsoftmax.ops.sparse import entmax_loss

N, D = 11, 5
SHORT, LONG = 50, 1003

for_every_alpha = pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0, 3.0])


@pytest.fixture(autouse=True)
def blocks_of_four_tokens(monkeypatch):
    """Several blocks, the last of them shorter."""
    monkeypatch.setattr(reference, "BLOCK", 0)
    monkeypatch.setattr(reference, "FEWEST", 4)


def operands(vocab, dtype=torch.float64, tokens=N, hidden=D, scale=1.0):
    hidden_ND = (scale * torch.randn(tokens, hidden, dtype=torch.float64)).to(dtype).requires_grad_()
    weight_VD = torch.randn(vocab, hidden, dtype=torch.float64).to(dtype).requires_grad_()
    bias_V = torch.randn(vocab, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden_ND, weight_VD, bias_V, torch.randint(vocab, (tokens,))


def plain(hidden_ND, weight_VD, bias_V, target_N, alpha):
    return entmax_loss(F.linear(hidden_ND, weight_VD, bias_V), target_N, alpha)


def some_zero(tokens=N):
    upstream_N = torch.randn(tokens, dtype=torch.float64)
    upstream_N[::3] = 0
    return upstream_N


def both(hidden_ND, weight_VD, bias_V, target_N, token_weight_N, alpha, **options):
    """The two forms of the weighted sum."""
    arguments = hidden_ND, weight_VD, bias_V, target_N
    yield linear_entmax_loss(*arguments, token_weight_N, alpha, **options)
    yield (token_weight_N * linear_entmax(*arguments, alpha, **options)).sum()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("scale", [0.001, 0.5, 3.0], ids=["wide", "mixed", "narrow"])
@pytest.mark.parametrize("vocab", [SHORT, LONG])
@for_every_alpha
def test_values_and_gradients(alpha, vocab, scale, sparse):
    hidden, weight, bias, target = operands(vocab, scale=scale)
    with torch.no_grad():
        bias *= scale
    variables = [hidden, weight, bias, some_zero().requires_grad_()]
    expected = (variables[3] * plain(hidden, weight, bias, target, alpha)).sum()
    upstream = torch.tensor(-1.7, dtype=torch.float64)
    slopes = torch.autograd.grad(expected, variables, upstream)
    for actual in both(hidden, weight, bias, target, variables[3], alpha, sparse=sparse):
        assert_close(actual, expected, 1e-10)
        found = torch.autograd.grad(actual, variables, upstream)
        assert [x.is_sparse for x in found] == [False, sparse, sparse, False]
        assert_close([x.to_dense() for x in found], list(slopes), 1e-10)


def test_blocks_of_many_and_of_few_pairs_in_one_call(monkeypatch):
    *tensors, target = operands(LONG, tokens=24)
    with torch.no_grad():
        tensors[2].zero_()
        tensors[0][:8] *= 1e-4  # two blocks with wide supports, the others' are narrow
        tensors[0][8:] *= 10
    expected = torch.autograd.grad(plain(*tensors, target, 1.5).sum(), tensors)
    ones = torch.ones(24, dtype=torch.float64)
    for pairs in (2**22, 20):  # as many as are there, and more often than a block
        monkeypatch.setattr(entmax, "PAIRS", pairs)
        for sparse in (False, True):
            for actual in both(*tensors, target, ones, 1.5, sparse=sparse):
                found = torch.autograd.grad(actual, tensors)
                assert_close([x.to_dense() for x in found], list(expected), 1e-10)


@for_every_alpha
def test_without_bias(alpha):
    hidden, weight, _, target = operands(LONG)
    ones = torch.ones(N, dtype=torch.float64)
    expected = plain(hidden, weight, None, target, alpha).sum()
    for actual in both(hidden, weight, None, target, ones, alpha):
        assert_close(actual, expected, 1e-10)
        slopes = [torch.autograd.grad(x, (hidden, weight), retain_graph=True) for x in (actual, expected)]
        assert_close(*slopes, 1e-10)


@pytest.mark.parametrize("wanted", range(3))
@pytest.mark.parametrize("scale", [0.001, 3.0], ids=["wide", "narrow"])
def test_one_gradient_alone(wanted, scale):
    *tensors, target = operands(LONG, scale=scale)
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i == wanted)
    expected = torch.autograd.grad(plain(*tensors, target, 1.5).sum(), tensors[wanted])
    for actual in both(*tensors, target, torch.ones(N, dtype=torch.float64), 1.5):
        assert_close(torch.autograd.grad(actual, tensors[wanted]), expected, 1e-10)


@pytest.mark.parametrize("vocab", [SHORT, LONG])
def test_no_tokens(vocab):
    *tensors, target = operands(vocab, tokens=0)
    assert linear_entmax(*tensors, target, 1.5).shape == (0,)
    for loss in both(*tensors, target, torch.ones(0, dtype=torch.float64), 1.5):
        assert loss == 0
        assert all(x is None or not x.any() for x in torch.autograd.grad(loss, tensors, allow_unused=True))


def test_the_target_pulls_with_all_that_the_others_have():
    """``p - 1`` as a difference is zero where p is 1 but for less than a float."""
    for fill in (0, LONG):  # all entries, or a list of them
        bias = torch.cat(
            [torch.tensor([0.0, -1 + 2.0**-20, -1 + 2.0**-20]), torch.full((fill,), -9.0)]
        ).requires_grad_()
        hidden, weight, target = torch.zeros(1, 1), torch.ones(3 + fill, 1), torch.tensor([0])
        for loss in both(hidden, weight, bias, target, torch.ones(1), 2.0):
            (slope,) = torch.autograd.grad(loss, bias)
            assert slope[1] == slope[2] > 0 and slope[0] == -slope[1:].sum()


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_touches_the_products_only(hidden_dtype):
    hidden, weight, bias, target = operands(20_000, torch.float32, tokens=64, hidden=64, scale=0.2)
    variables = (hidden.detach().to(hidden_dtype).requires_grad_(), weight, bias)
    exact = [x.detach().double().requires_grad_() for x in variables]
    truth = plain(*exact, target, 1.5)
    weights = torch.full((64,), 1 / 64)
    slopes = torch.autograd.grad(truth, exact, weights.double())
    with torch.autocast("cpu", torch.bfloat16):
        eager = plain(*variables, target, 1.5)
        values = list(both(*variables, target, weights, 1.5))
        token = linear_entmax(*variables, target, 1.5)
    assert token.dtype == torch.float32
    assert (token - truth).abs().mean() <= 1.1 * (eager - truth).abs().mean()
    eager_slopes = torch.autograd.grad(eager, variables, weights)
    for value in values:
        assert value.dtype == torch.float32
        for variable, slope, of_eager, expected in zip(
            variables, torch.autograd.grad(value, variables), eager_slopes, slopes, strict=True
        ):
            assert slope.dtype == variable.dtype
            assert (slope - expected).norm() <= 1.1 * (of_eager - expected).norm() + 1e-6 * expected.norm()


@pytest.mark.parametrize("scale", [0.001, 3.0], ids=["wide", "narrow"])
def test_no_array_holds_a_logit_per_token_and_word(scale):
    *tensors, target = operands(LONG, tokens=64, scale=scale)
    with LargestResult() as largest:
        for loss in both(*tensors, target, torch.ones(64, dtype=torch.float64), 2.0):
            loss.backward()
    assert largest.entries < 64 * LONG / 4


def test_the_weighted_sum_is_differentiated_once():
    *tensors, target = operands(SHORT)
    loss = linear_entmax_loss(*tensors, target, torch.ones(N, dtype=torch.float64), 1.5)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once; use the per-token one"):
        loss.backward()
