"""The fused cross-entropy where digits are lost: certainty, logits far apart, infinities, bfloat16."""

import pytest
import torch
import torch.nn.functional as F
from cross_entropies import N, autocast, operands, plain, skip_without_need, slopes, some_zero

from lvsoftmax.ops.backends import interprets_triton
from lvsoftmax.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_loss, reference

pytestmark = pytest.mark.usefixtures("blocks_of_few_tokens")


def test_gradients_are_right_where_p_is_all_but_one(backend):
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
        torch.autograd.grad(linear_cross_entropy(*single, best, backend=backend), single, upstream.float()),
        torch.autograd.grad(linear_cross_entropy_loss(*single, best, upstream.float(), backend=backend), single),
    ):
        for gradient, expected in zip(actual, truth, strict=True):
            assert (gradient - expected).norm() <= 1e-4 * expected.norm()


def test_values_keep_their_digits_as_p_goes_to_one(backend):
    logits = torch.tensor([[12.0, 0.0, -30.0], [25.0, 0.0, 0.0]])
    nll = linear_cross_entropy(logits, torch.eye(3), None, torch.tensor([0, 0]), backend=backend)
    expected = plain(logits.double(), torch.eye(3).double(), None, torch.tensor([0, 0]))
    torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("falls", [False, True], ids=["rising", "falling"])
def test_the_largest_logit_may_come_at_any_place(backend, falls):
    """Sums are relative to a number near the largest logit so far; here it rises by 40 nats and more, many times."""
    vocab = 700
    bias = torch.linspace(-300.0, 500.0, vocab, dtype=torch.float64)
    bias = (bias.flip(0) if falls else bias).requires_grad_()
    hidden, weight, _, _ = operands(vocab=vocab, tokens=40)
    target = torch.randint(vocab, (40,))
    variables = (hidden, weight, bias)
    exact = plain(*variables, target)
    upstream = some_zero(40)
    truth = slopes(exact, variables, upstream)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-3)):
        given = [x.detach().to(dtype).requires_grad_() for x in variables]
        loss = linear_cross_entropy_loss(*given, target, upstream.to(dtype), backend=backend)
        for gradient, true in zip(torch.autograd.grad(loss, given), truth, strict=True):
            assert (gradient - true).norm() <= tolerance * true.norm()


@pytest.mark.parametrize("likely", [88.7, 500.0])
def test_a_bias_beyond_the_exponential_stays_out_of_the_rows_that_fill_a_block(backend, likely):
    *tensors, _ = operands(torch.float32)
    with torch.no_grad():
        tensors[2][4] = likely
    target = torch.full((N,), 2)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    upstream = torch.ones(N)
    truth = slopes(plain(*exact, target), exact, upstream.double())
    nll = linear_cross_entropy(*tensors, target, backend=backend)
    loss = linear_cross_entropy_loss(*tensors, target, upstream, backend=backend)
    for found in (slopes(nll, tensors, upstream), torch.autograd.grad(loss, tensors)):
        for gradient, true in zip(found, truth, strict=True):
            assert (gradient - true).norm() <= 1e-4 * true.norm()


def test_words_that_are_ruled_out(backend):
    """A bias of -inf takes a word out of the distribution; where it leaves one word, that one is certain."""
    hidden, weight, bias, _ = operands()
    with torch.no_grad():
        bias[2:9] = -torch.inf
    target = torch.randint(2, (N,))
    variables = (hidden, weight, bias)
    expected = plain(*variables, target)
    actual = linear_cross_entropy(*variables, target, backend=backend)
    torch.testing.assert_close(actual, expected)
    ones = torch.ones(N, dtype=torch.float64)
    loss = linear_cross_entropy_loss(*variables, target, ones, backend=backend)
    for found in (slopes(actual, variables, ones), torch.autograd.grad(loss, variables)):
        torch.testing.assert_close(found, slopes(expected, variables, ones))
    with torch.no_grad():
        bias[1:] = -torch.inf
    certain = torch.zeros(N, dtype=torch.long)
    nll = linear_cross_entropy(*variables, certain, backend=backend)
    loss = linear_cross_entropy_loss(*variables, certain, ones, backend=backend)
    assert not nll.any() and not loss
    for found in (slopes(nll, variables, ones), torch.autograd.grad(loss, variables)):
        assert not any(gradient.any() for gradient in found)


def test_what_is_no_number_stays_none(backend):
    hidden, weight, bias, target = operands()
    with torch.no_grad():
        hidden[4, 1] = torch.nan
    nll = linear_cross_entropy(hidden, weight, bias, target, backend=backend)
    assert nll.isnan().nonzero().flatten().tolist() == [4]
    loss = linear_cross_entropy_loss(hidden, weight, bias, target, torch.ones(N, dtype=torch.float64), backend=backend)
    assert loss.isnan()
    assert torch.autograd.grad(loss, weight)[0].isnan().all()


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_at_a_real_vocabulary(backend, hidden_dtype):
    """Sums over 33,278 words in bfloat16 would stall: the loss would come out 1.5 nats too small."""
    skip_without_need(backend, needed=not interprets_triton())
    tokens, hidden_size, vocab = 64, 256, 33278
    hidden, weight, bias, target = operands(torch.float32, tokens, hidden_size, vocab, scale=0.4 / hidden_size**0.5)
    bias = torch.zeros(vocab, requires_grad=True)
    variables = (hidden.detach().to(hidden_dtype).requires_grad_(), weight, bias)
    exact = [x.detach().double().requires_grad_() for x in variables]
    truth = plain(*exact, target)
    assert truth.mean().item() == pytest.approx(10.5, abs=0.1)
    weights = torch.full((tokens,), 1 / tokens)
    with autocast(target):
        values = {
            "per token": linear_cross_entropy(*variables, target, backend=backend),
            "sum": linear_cross_entropy_loss(*variables, target, weights, backend=backend),
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


def test_a_table_in_bfloat16_gets_the_loss_that_pytorch_misses(backend, monkeypatch):
    """Where PyTorch's own ``linear_cross_entropy`` sums in bfloat16 and says 8.94, 10.50 is right."""
    skip_without_need(backend, needed=not interprets_triton())
    tokens, hidden_size, vocab = 1024, 256, 33278
    hidden = (0.4 / hidden_size**0.5 * torch.randn(tokens, hidden_size)).bfloat16().requires_grad_()
    weight, target = torch.randn(vocab, hidden_size).bfloat16().requires_grad_(), torch.randint(vocab, (tokens,))
    monkeypatch.setattr(reference, "BLOCK", 2**22)
    with torch.no_grad():
        truth = plain(hidden.float(), weight.float(), None, target).mean().item()
    weights = torch.full((tokens,), 1 / tokens)
    loss = linear_cross_entropy_loss(hidden, weight, None, target, weights, backend=backend)
    assert loss.item() == pytest.approx(truth, abs=2e-3)
    assert linear_cross_entropy(hidden, weight, None, target, backend=backend).mean().item() == pytest.approx(
        truth, abs=2e-3
    )
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
