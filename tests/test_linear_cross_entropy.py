"""The fused cross-entropy, by every backend, against PyTorch's own, on sizes that fit nothing."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lvsoftmax.ops import buffers
from lvsoftmax.ops.backends import interprets_triton
from lvsoftmax.ops.linear_cross_entropy import (
    gpu,
    linear_cross_entropy,
    linear_cross_entropy_and_logsumexp,
    linear_cross_entropy_loss,
    linear_logsumexp,
    native,
    reference,
    soft_capped,
)

N, D, V = 11, 3, 13


def skip_without_need(backend, *, needed):
    """Skip what would tell nothing new, or take minutes in Triton's interpreter."""
    if backend == "triton" and not needed:
        pytest.skip("tried in one form only")


def autocast(tensor):
    return torch.autocast(tensor.device.type, torch.bfloat16)


@pytest.fixture(autouse=True)
def blocks_of_few_tokens(monkeypatch):
    """Several blocks, the last of them shorter: of four tokens, and of a whole register of them in C++."""
    monkeypatch.setattr(reference, "BLOCK", 4 * V)
    monkeypatch.setattr(reference, "FEWEST", 4)
    monkeypatch.setattr(native, "TOKENS", 32)


def operands(dtype=torch.float64, tokens=N, hidden=D, vocab=V, scale=1.0):
    hidden_ND = (scale * torch.randn(tokens, hidden, dtype=torch.float64)).to(dtype).requires_grad_()
    weight_VD = torch.randn(vocab, hidden, dtype=torch.float64).to(dtype).requires_grad_()
    bias_V = torch.randn(vocab, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden_ND, weight_VD, bias_V, torch.randint(vocab, (tokens,))


def plain(hidden_ND, weight_VD, bias_V, target_N, softcap=None):
    logits = soft_capped(F.linear(hidden_ND, weight_VD, bias_V), softcap)
    return F.cross_entropy(logits, target_N, reduction="none")


def weighted(hidden_ND, weight_VD, bias_V, target_N, token_weight_N):
    return (token_weight_N * plain(hidden_ND, weight_VD, bias_V, target_N)).sum()


def some_zero(tokens=N, dtype=torch.float64):
    upstream_N = torch.randn(tokens, dtype=dtype)
    upstream_N[::3] = 0
    return upstream_N


def slopes(value, variables, upstream):
    return torch.autograd.grad(value, variables, upstream, retain_graph=True)


# -- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_per_token_values_and_gradients(backend, softcap):
    *tensors, target = operands()
    options = {"softcap": softcap, "backend": backend}
    *few, word = operands(tokens=2, vocab=4)
    assert torch.autograd.gradcheck(lambda *x: linear_cross_entropy(*x, word, **options), few)
    actual, expected = linear_cross_entropy(*tensors, target, **options), plain(*tensors, target, softcap)
    upstream = some_zero()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(slopes(actual, tensors, upstream), slopes(expected, tensors, upstream))


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_log_sum_exp_is_differentiable_beside_the_cross_entropy(backend, softcap):
    *tensors, target = operands()
    options = {"softcap": softcap, "backend": backend}
    nll, log_sum = linear_cross_entropy_and_logsumexp(*tensors, target, **options)
    logits = soft_capped(F.linear(*tensors), softcap)
    torch.testing.assert_close(log_sum, logits.logsumexp(1))
    torch.testing.assert_close(linear_logsumexp(*tensors, **options), logits.logsumexp(1))
    # a penalty on the normaliser and smoothed labels, composed outside
    upstream = some_zero()
    actual = (upstream * (nll + 0.1 * log_sum.square())).sum()
    expected = (upstream * (plain(*tensors, target, softcap) + 0.1 * logits.logsumexp(1).square())).sum()
    torch.testing.assert_close(slopes(actual, tensors, None), slopes(expected, tensors, None))
    torch.testing.assert_close(
        slopes(linear_logsumexp(*tensors, **options), tensors, upstream),
        slopes(logits.logsumexp(1), tensors, upstream),
    )


def test_smoothed_labels_compose_of_cross_entropy_and_log_sum_exp(backend):
    hidden, weight, bias, target = operands()
    nll, log_sum = linear_cross_entropy_and_logsumexp(hidden, weight, bias, target, backend=backend)
    actual = 0.9 * nll + 0.1 * (log_sum - hidden @ weight.mean(0) - bias.mean())
    expected = F.cross_entropy(F.linear(hidden, weight, bias), target, reduction="none", label_smoothing=0.1)
    upstream = some_zero()
    torch.testing.assert_close(actual, expected)
    variables = (hidden, weight, bias)
    torch.testing.assert_close(slopes(actual, variables, upstream), slopes(expected, variables, upstream))


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("z_loss", [0.0, 0.3, -2.0])
@pytest.mark.parametrize("kept", [0, 2**40], ids=["computed again", "kept"])
def test_weighted_sum_and_gradients(backend, softcap, z_loss, kept, monkeypatch):
    monkeypatch.setattr(native, "KEPT", kept)
    *tensors, target = operands()
    weight = some_zero().requires_grad_()
    actual = linear_cross_entropy_loss(*tensors, target, weight, z_loss=z_loss, softcap=softcap, backend=backend)
    log_sum = soft_capped(F.linear(*tensors), softcap).logsumexp(1)
    expected = (weight * (plain(*tensors, target, softcap) + z_loss * log_sum.square())).sum()
    upstream = torch.tensor(-2.5, dtype=torch.float64)
    torch.testing.assert_close(actual, expected)
    with torch.no_grad():
        value = linear_cross_entropy_loss(*tensors, target, weight, z_loss=z_loss, softcap=softcap, backend=backend)
    torch.testing.assert_close(value, actual.detach())
    torch.testing.assert_close(
        torch.autograd.grad(actual, [*tensors, weight], upstream),
        torch.autograd.grad(expected, [*tensors, weight], upstream),
    )


SHAPES = [(1, 1, 2), (33, 17, 131), (70, 65, 400), (100, 32, 56), (5, 100, 999), (64, 31, 225)]


@pytest.fixture
def poison(monkeypatch):
    """Uninitialised memory holds no numbers."""

    def poisoned(shape, dtype, device="cpu"):
        memory = torch.empty(shape, dtype=dtype, device=device)
        return memory.fill_(255 if dtype == torch.uint8 else math.nan)

    for module in (native, buffers):
        monkeypatch.setattr(module, "recycled", poisoned)
    monkeypatch.setattr(gpu, "_empty", lambda like, shape, dtype: poisoned(shape, dtype, like.device))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kept", [0, 2**40], ids=["computed again", "kept"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_awkward_shapes(backend, shape, kept, threads, monkeypatch):
    """By blocks whose exponentials are kept for the gradients or not, by more threads than there are words."""
    skip_without_need(backend, needed=kept and threads == 1)
    monkeypatch.setattr(native, "KEPT", kept)
    torch.set_num_threads(threads)
    *tensors, target = operands(torch.float64, *shape)
    for softcap in (None, 3.0):
        expected = plain(*tensors, target, softcap)
        upstream = some_zero(shape[0])
        truth = slopes(expected, tensors, upstream)
        options = {"softcap": softcap, "backend": backend}
        actual = linear_cross_entropy(*tensors, target, **options)
        loss = linear_cross_entropy_loss(*tensors, target, upstream, **options)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(loss, (upstream * expected).sum())
        torch.testing.assert_close(slopes(actual, tensors, upstream), truth)
        torch.testing.assert_close(torch.autograd.grad(loss, tensors), truth)


@pytest.mark.parametrize("kept", [0, 2**40], ids=["computed again", "kept"])
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_awkward_shapes_in_single_precision(backend, shape, table, kept, monkeypatch):
    skip_without_need(backend, needed=kept)
    monkeypatch.setattr(native, "KEPT", kept)
    hidden, weight, bias, target = operands(torch.float32, *shape)
    weight = weight.detach().to(table).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    upstream = some_zero(shape[0], torch.float32)
    expected = plain(*exact, target)
    truth = slopes(expected, exact, upstream.double())
    if table == torch.bfloat16 and backend == "eager":
        weight = weight.detach().float().requires_grad_()  # PyTorch multiplies equals only
    actual = linear_cross_entropy(hidden, weight, bias, target, backend=backend)
    loss = linear_cross_entropy_loss(hidden, weight, bias, target, upstream, backend=backend)
    variables = (hidden, weight, bias)
    assert (actual - expected).norm() <= 3e-6 * expected.norm()
    for found in (slopes(actual, variables, upstream), torch.autograd.grad(loss, variables)):
        for gradient, true, like in zip(found, truth, variables, strict=True):
            assert gradient.dtype == like.dtype
            tolerance = 1e-2 if like.dtype == torch.bfloat16 else 1e-5
            assert (gradient - true).norm() <= tolerance * true.norm() + 1e-12


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kept", [0, 2**40], ids=["computed again", "kept"])
@pytest.mark.usefixtures("poison")
def test_awkward_shapes_in_bfloat16(backend, shape, kept, monkeypatch):
    """Not further off than what PyTorch makes of the same operands."""
    skip_without_need(backend, needed=kept)
    monkeypatch.setattr(native, "KEPT", kept)
    *tensors, target = operands(torch.float32, *shape, scale=0.3)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    upstream = some_zero(shape[0], torch.float32)
    expected = plain(*exact, target)
    truth = slopes(expected, exact, upstream.double())
    with autocast(target):
        eager = plain(*tensors, target)
        actual = linear_cross_entropy(*tensors, target, backend=backend)
        loss = linear_cross_entropy_loss(*tensors, target, upstream, backend=backend)
    assert actual.dtype == loss.dtype == torch.float32
    assert (actual - expected).norm() <= 1.2 * (eager - expected).norm() + 1e-3
    allowed = slopes(eager, tensors, upstream)
    for found in (slopes(actual, tensors, upstream), torch.autograd.grad(loss, tensors)):
        for gradient, other, true in zip(found, allowed, truth, strict=True):
            assert (gradient - true).norm() <= 1.2 * (other - true).norm() + 4e-3 * true.norm()


def test_without_bias(backend):
    hidden, weight, _, target = operands()
    actual = linear_cross_entropy(hidden, weight, None, target, backend=backend)
    torch.testing.assert_close(actual, plain(hidden, weight, None, target))
    ones = torch.ones(N, dtype=torch.float64)
    actual = linear_cross_entropy_loss(hidden, weight, None, target, ones, backend=backend)
    expected = plain(hidden, weight, None, target).sum()
    torch.testing.assert_close(
        torch.autograd.grad(actual, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight))
    )


@pytest.mark.parametrize("wanted", range(3))
def test_one_gradient_alone(backend, wanted):
    *tensors, target = operands()
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i == wanted)
    expected = torch.autograd.grad(plain(*tensors, target).sum(), tensors[wanted])
    ones = torch.ones(N, dtype=torch.float64)
    for actual in (
        linear_cross_entropy(*tensors, target, backend=backend).sum(),
        linear_cross_entropy_loss(*tensors, target, ones, backend=backend),
    ):
        torch.testing.assert_close(torch.autograd.grad(actual, tensors[wanted]), expected)


def test_no_tokens(backend):
    *tensors, target = operands(tokens=0)
    assert linear_cross_entropy(*tensors, target, backend=backend).shape == (0,)
    loss = linear_cross_entropy_loss(*tensors, target, torch.ones(0, dtype=torch.float64), backend=backend)
    assert loss == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, tensors))


def test_strided_inputs(backend):
    hidden = torch.randn(D, 2 * N, dtype=torch.float64).T[::2].requires_grad_()
    weight = torch.randn(D, V, dtype=torch.float64).T.requires_grad_()
    bias = torch.randn(1, dtype=torch.float64).expand(V).requires_grad_()
    target = torch.randint(V, (2 * N,))[::2]
    token_weight = torch.tensor(0.3, dtype=torch.float64).expand(N)
    expected = weighted(hidden, weight, bias, target, token_weight)
    for actual in (
        linear_cross_entropy_loss(hidden, weight, bias, target, token_weight, backend=backend),
        (linear_cross_entropy(hidden, weight, bias, target, backend=backend) * token_weight).sum(),
    ):
        torch.testing.assert_close(actual, expected)
        for gradient, truth in zip(
            torch.autograd.grad(actual, (hidden, weight, bias)),
            torch.autograd.grad(expected, (hidden, weight, bias), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(gradient, truth)


# -- digits -----------------------------------------------------------------------------------------------------------


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


# -- memory and work --------------------------------------------------------------------------------------------------


class LargestResult(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.entries = max(self.entries, x.numel())
        return result


def test_no_array_holds_a_logit_per_token_and_word(backend):
    *tensors, target = operands()
    with LargestResult() as largest:
        linear_cross_entropy(*tensors, target, backend=backend).sum().backward()
        ones = torch.ones(N, dtype=torch.float64)
        linear_cross_entropy_loss(*tensors, target, ones, backend=backend).backward()
    assert largest.entries <= max(reference.BLOCK, V * D) < N * V


def test_autograd_takes_the_gradients_without_copying_them(backend):
    *tensors, target = operands()
    loss = linear_cross_entropy_loss(*tensors, target, torch.ones(N, dtype=torch.float64), backend=backend)
    made = [gradient.data_ptr() for gradient in loss.grad_fn.gradients if gradient is not None]
    loss.backward()
    assert [tensor.grad.data_ptr() for tensor in tensors] == made


def test_the_weighted_sum_is_differentiated_once(backend):
    *tensors, target = operands()
    loss = linear_cross_entropy_loss(*tensors, target, torch.ones(N, dtype=torch.float64), backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once; use the per-token one"):
        loss.backward()


def test_operations_are_counted(backend):
    """Three products for the loss, four by the token, one without gradients; Triton has four for the loss as well."""
    *tensors, target = operands()
    product = 2 * N * D * V

    def count(step):
        with FlopCounterMode(display=False) as counter:
            step()
        return counter.get_total_flops() / product

    ones = torch.ones(N, dtype=torch.float64)
    in_place = 1 if backend == "eager" else 0  # a product that adds in place is missing in torch's own table
    loss = count(lambda: linear_cross_entropy_loss(*tensors, target, ones, backend=backend))
    assert loss == (4 if backend == "triton" else 3 - in_place)
    assert count(lambda: linear_cross_entropy(*tensors, target, backend=backend).sum().backward()) == 4 - in_place
    with torch.no_grad():
        assert count(lambda: linear_cross_entropy(*tensors, target, backend=backend)) == 1
        assert count(lambda: linear_cross_entropy_loss(*tensors, target, ones, backend=backend)) == 1


def test_results_do_not_depend_on_the_weather(backend):
    """Sums are taken in one order, whichever thread is faster."""
    *tensors, target = operands(torch.float32, 70, 33, 900)
    torch.set_num_threads(3)
    ones = torch.ones(70)
    runs = [
        torch.autograd.grad(linear_cross_entropy_loss(*tensors, target, ones, backend=backend), tensors)
        for _ in range(5)
    ]
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


def test_blocks_fit_into_what_may_be_kept(monkeypatch):
    monkeypatch.setattr(native, "TOKENS", 512)
    assert native._block(4096, 100_000, 4, True) == (410, True)
    assert native._block(1024, 33_278, 4, True) == (512, True)
    assert native._block(1024, 33_278, 4, False) == (512, False)
    assert native._block(4096, 1_000_000, 4, True) == (512, False)
    assert native._block(20, 1_000_000, 4, True) == (20, True)
    assert native._block(1, 10**9, 8, True) == (1, False)
    for tokens in (1, 100, 600, 5000):
        for vocab in (2, 50_000, 10**6):
            size, keeps = native._block(tokens, vocab, 4, True)
            assert 1 <= size <= 512
            assert not keeps or -(-size // native.WHOLE) * native.WHOLE * vocab * 4 <= native.KEPT


# -- bad input --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_named(backend):
    hidden, weight, bias, target = operands()
    ones = torch.ones(N, dtype=torch.float64)
    for name, arguments in {
        "hidden": (hidden[:, :2], weight, bias, target, ones),
        "bias": (hidden, weight, bias[1:], target, ones),
        "target": (hidden, weight, bias, target[1:], ones),
        "token_weight": (hidden, weight, bias, target, ones[1:]),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} has shape"):
            linear_cross_entropy_loss(*arguments, backend=backend)
        if name != "token_weight":
            with pytest.raises(ValueError, match=f"^{name} has shape"):
                linear_cross_entropy(*arguments[:4], backend=backend)
    with pytest.raises(ValueError, match=rf"^target is on meta and weight on {weight.device}; move one of them"):
        linear_cross_entropy(hidden, weight, bias, target.to("meta"), backend=backend)
    with pytest.raises(ValueError, match=r"^softcap=0.0: must be positive"):
        linear_cross_entropy(hidden, weight, bias, target, softcap=0.0, backend=backend)
    with pytest.raises(ValueError, match=r"^backend='none': choose one of auto, "):
        linear_cross_entropy(hidden, weight, bias, target, backend="none")


@pytest.mark.parametrize("wrong", [-1, V])
def test_a_word_that_does_not_exist_is_refused(backend, wrong):
    hidden, weight, bias, target = operands()
    target[3] = wrong
    if target.is_cuda:  # nothing waits for the device
        assert linear_cross_entropy(hidden, weight, bias, target, backend=backend).isnan().tolist()[2:5] == [0, 1, 0]
        return
    with pytest.raises((ValueError, RuntimeError), match=r"must be in \[0, 13\)|out of bounds"):
        linear_cross_entropy(hidden, weight, bias, target, backend=backend)
    with pytest.raises((ValueError, RuntimeError), match=r"must be in \[0, 13\)|out of bounds"):
        linear_cross_entropy_loss(hidden, weight, bias, target, torch.ones(N, dtype=torch.float64), backend=backend)


def test_fewer_threads_than_asked_for_give_the_same(tmp_path):
    """The system decides how many there are, by its own rules or by a limit."""
    code = """
import sys, torch
from lvsoftmax.ops.linear_cross_entropy import linear_cross_entropy_loss
torch.set_num_threads(3)
draw = torch.Generator().manual_seed(1)
hidden, weight, bias = (torch.randn(*size, generator=draw).requires_grad_() for size in ((40, 24), (1500, 24), (1500,)))
target = torch.randint(1500, (40,), generator=draw)
found = []
for backend in ("cpp", "eager"):
    loss = linear_cross_entropy_loss(hidden, weight, bias, target, torch.full((40,), 1 / 40), backend=backend)
    found.append((loss, *torch.autograd.grad(loss, (hidden, weight, bias))))
for one, other in zip(*found):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"OMP_THREAD_LIMIT": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
