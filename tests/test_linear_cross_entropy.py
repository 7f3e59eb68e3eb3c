"""The fused cross-entropy against PyTorch's own, on sizes that fit nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lvsoftmax.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_loss, reference

N, D, V = 11, 3, 13


@pytest.fixture(autouse=True)
def blocks_of_four_tokens(monkeypatch):
    """Several blocks, the last of them shorter."""
    monkeypatch.setattr(reference, "BLOCK", 4 * V)
    monkeypatch.setattr(reference, "FEWEST", 4)


def operands(dtype=torch.float64, tokens=N, hidden=D, vocab=V, scale=1.0):
    hidden_ND = (scale * torch.randn(tokens, hidden, dtype=torch.float64)).to(dtype).requires_grad_()
    weight_VD = torch.randn(vocab, hidden, dtype=torch.float64).to(dtype).requires_grad_()
    bias_V = torch.randn(vocab, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden_ND, weight_VD, bias_V, torch.randint(vocab, (tokens,))


def plain(hidden_ND, weight_VD, bias_V, target_N):
    return F.cross_entropy(F.linear(hidden_ND, weight_VD, bias_V), target_N, reduction="none")


def weighted(hidden_ND, weight_VD, bias_V, target_N, token_weight_N):
    return (token_weight_N * plain(hidden_ND, weight_VD, bias_V, target_N)).sum()


def some_zero(tokens=N, dtype=torch.float64):
    upstream_N = torch.randn(tokens, dtype=dtype)
    upstream_N[::3] = 0
    return upstream_N


def test_per_token_values_and_gradients():
    *tensors, target = operands()
    assert torch.autograd.gradcheck(lambda *x: linear_cross_entropy(*x, target), tensors)
    actual, expected = linear_cross_entropy(*tensors, target), plain(*tensors, target)
    upstream = some_zero()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, tensors, upstream), torch.autograd.grad(expected, tensors, upstream)
    )


def test_weighted_sum_and_gradients():
    *tensors, target = operands()
    weight = some_zero().requires_grad_()
    actual, expected = (f(*tensors, target, weight) for f in (linear_cross_entropy_loss, weighted))
    upstream = torch.tensor(-2.5, dtype=torch.float64)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, [*tensors, weight], upstream),
        torch.autograd.grad(expected, [*tensors, weight], upstream),
    )


def test_without_bias():
    hidden, weight, _, target = operands()
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, None, target), plain(hidden, weight, None, target))
    ones = torch.ones(N, dtype=torch.float64)
    actual = linear_cross_entropy_loss(hidden, weight, None, target, ones)
    expected = plain(hidden, weight, None, target).sum()
    torch.testing.assert_close(
        torch.autograd.grad(actual, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight))
    )


@pytest.mark.parametrize("wanted", range(3))
def test_one_gradient_alone(wanted):
    *tensors, target = operands()
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i == wanted)
    expected = torch.autograd.grad(plain(*tensors, target).sum(), tensors[wanted])
    ones = torch.ones(N, dtype=torch.float64)
    for actual in (linear_cross_entropy(*tensors, target).sum(), linear_cross_entropy_loss(*tensors, target, ones)):
        torch.testing.assert_close(torch.autograd.grad(actual, tensors[wanted]), expected)


def test_no_tokens():
    *tensors, target = operands(tokens=0)
    assert linear_cross_entropy(*tensors, target).shape == (0,)
    loss = linear_cross_entropy_loss(*tensors, target, torch.ones(0, dtype=torch.float64))
    assert loss == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, tensors))


def test_strided_inputs():
    hidden = torch.randn(D, 2 * N, dtype=torch.float64).T[::2].requires_grad_()
    weight = torch.randn(D, V, dtype=torch.float64).T.requires_grad_()
    bias = torch.randn(1, dtype=torch.float64).expand(V).requires_grad_()
    target = torch.randint(V, (2 * N,))[::2]
    token_weight = torch.tensor(0.3, dtype=torch.float64).expand(N)
    expected = weighted(hidden, weight, bias, target, token_weight)
    for actual in (
        linear_cross_entropy_loss(hidden, weight, bias, target, token_weight),
        (linear_cross_entropy(hidden, weight, bias, target) * token_weight).sum(),
    ):
        torch.testing.assert_close(actual, expected)
        for gradient, truth in zip(
            torch.autograd.grad(actual, (hidden, weight, bias)),
            torch.autograd.grad(expected, (hidden, weight, bias), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(gradient, truth)


def test_gradients_are_right_where_p_is_all_but_one():
    """``1 - p`` is about 1e-9 here, far below what float32 can tell from zero beside 1."""
    _, weight, bias, target = operands()
    with torch.no_grad():
        hidden = 40 * weight[target] / weight[target].norm(dim=1, keepdim=True).square()
        weight -= 0.95 * weight.mean(0)
        best = F.linear(hidden, weight, bias).argmax(1)
    exact = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    single = [x.detach().float().requires_grad_() for x in (hidden, weight, bias)]
    sure = plain(*exact, best) < 1e-6
    assert sure.any()
    upstream = sure.double()
    truth = torch.autograd.grad(plain(*exact, best), exact, upstream)
    for actual in (
        torch.autograd.grad(linear_cross_entropy(*single, best), single, upstream.float()),
        torch.autograd.grad(linear_cross_entropy_loss(*single, best, upstream.float()), single),
    ):
        for gradient, expected in zip(actual, truth, strict=True):
            assert (gradient - expected).norm() <= 1e-4 * expected.norm()


def test_values_keep_their_digits_as_p_goes_to_one():
    logits = torch.tensor([[12.0, 0.0, -30.0], [25.0, 0.0, 0.0]])
    nll = linear_cross_entropy(logits, torch.eye(3), None, torch.tensor([0, 0]))
    expected = plain(logits.double(), torch.eye(3).double(), None, torch.tensor([0, 0]))
    torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_at_a_real_vocabulary(hidden_dtype):
    """Sums over 33,278 words in bfloat16 would stall: the loss would come out 1.5 nats too small."""
    tokens, hidden_size, vocab = 64, 256, 33278
    hidden, weight, bias, target = operands(torch.float32, tokens, hidden_size, vocab, scale=0.4 / hidden_size**0.5)
    bias = torch.zeros(vocab, requires_grad=True)
    variables = (hidden.detach().to(hidden_dtype).requires_grad_(), weight, bias)
    exact = [x.detach().double().requires_grad_() for x in variables]
    truth = plain(*exact, target)
    assert truth.mean().item() == pytest.approx(10.5, abs=0.1)
    weights = torch.full((tokens,), 1 / tokens)
    with torch.autocast("cpu", torch.bfloat16):
        values = {
            "per token": linear_cross_entropy(*variables, target),
            "sum": linear_cross_entropy_loss(*variables, target, weights),
            "eager": plain(*variables, target),
        }
    eager_error = (values["eager"] - truth).abs().mean()
    assert values["per token"].dtype == values["sum"].dtype == torch.float32
    assert (values["per token"] - truth).abs().mean() <= 1.1 * eager_error
    assert (values["sum"] - truth.mean()).abs() <= eager_error
    expected = torch.autograd.grad(truth, exact, weights.double())
    slopes = {
        name: torch.autograd.grad(value, variables, torch.ones(()) if name == "sum" else weights)
        for name, value in values.items()
    }
    for i in range(3):
        errors = {name: (slope[i].double() - expected[i]).norm() for name, slope in slopes.items()}
        assert slopes["sum"][i].dtype == slopes["per token"][i].dtype == variables[i].dtype
        assert max(errors["sum"], errors["per token"]) <= 1.1 * errors["eager"] + 1e-6 * expected[i].norm()


class LargestResult(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.entries = max(self.entries, x.numel())
        return result


def test_no_array_holds_a_logit_per_token_and_word():
    *tensors, target = operands()
    with LargestResult() as largest:
        linear_cross_entropy(*tensors, target).sum().backward()
        linear_cross_entropy_loss(*tensors, target, torch.ones(N, dtype=torch.float64)).backward()
    assert largest.entries == max(reference.BLOCK, V * D) < N * V


def test_autograd_takes_the_gradients_without_copying_them():
    *tensors, target = operands()
    loss = linear_cross_entropy_loss(*tensors, target, torch.ones(N, dtype=torch.float64))
    made = [gradient.data_ptr() for gradient in loss.grad_fn.gradients]
    loss.backward()
    assert [tensor.grad.data_ptr() for tensor in tensors] == made


def test_the_weighted_sum_is_differentiated_once():
    *tensors, target = operands()
    loss = linear_cross_entropy_loss(*tensors, target, torch.ones(N, dtype=torch.float64))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="use the per-token nll"):
        loss.backward()
