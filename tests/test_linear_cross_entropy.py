"""The fused cross-entropy, by every backend, against PyTorch's own, on sizes that fit nothing; what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from cross_entropies import SHAPES, D, N, V, autocast, operands, plain, skip_without_need, slopes, some_zero

from lvsoftmax.ops import buffers
from lvsoftmax.ops.linear_cross_entropy import (
    gpu,
    linear_cross_entropy,
    linear_cross_entropy_and_logsumexp,
    linear_cross_entropy_loss,
    linear_logsumexp,
    native,
    soft_capped,
)

pytestmark = pytest.mark.usefixtures("blocks_of_few_tokens")


def weighted(hidden_ND, weight_VD, bias_V, target_N, token_weight_N):
    return (token_weight_N * plain(hidden_ND, weight_VD, bias_V, target_N)).sum()


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
