"""The cross-entropy of any normaliser, by every backend, against the plain formula, on sizes that fit nothing."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import LargestResult, assert_close
from cross_entropies import SHAPES, slopes
from torch.utils.flop_counter import FlopCounterMode

from lvsoftmax.ops import buffers
from lvsoftmax.ops.linear_cross_entropy import (
    NORMALISED_BACKENDS,
    linear_cross_entropy,
    linear_cross_entropy_loss,
    native,
    normalised_cross_entropy,
    normalised_cross_entropy_loss,
    reference,
)
from lvsoftmax.ops.normalisers import Exponential, Sigmoidal, Spherical, Taylor, log_normalise

N, D, V = 11, 3, 13

for_every_normaliser = pytest.mark.parametrize(
    "normaliser", [Exponential(), Spherical(0.3), Spherical(1e-4), Taylor(), Sigmoidal()], ids=str
)
for_every_other_normaliser = pytest.mark.parametrize("normaliser", [Spherical(0.3), Taylor(), Sigmoidal()], ids=str)
kept_or_not = pytest.mark.parametrize("kept", [0, 2**40], ids=["computed again", "kept"])


@pytest.fixture(params=list(NORMALISED_BACKENDS.obstacles))
def backend(request):
    """Every backend that can run here."""
    reason = NORMALISED_BACKENDS.obstacles[request.param](torch.device("cpu"))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def blocks_of_few_tokens(monkeypatch):
    """Several blocks, the last of them shorter: of four tokens, and of a whole register of them in C++."""
    monkeypatch.setattr(reference, "BLOCK", 8 * V)
    monkeypatch.setattr(reference, "FEWEST", 4)
    monkeypatch.setattr(native, "TOKENS", 32)


@pytest.fixture
def poison(monkeypatch):
    """Uninitialised memory holds no numbers."""

    def poisoned(shape, dtype):
        return torch.empty(shape, dtype=dtype).fill_(255 if dtype == torch.uint8 else math.nan)

    for module in (native, buffers):
        monkeypatch.setattr(module, "recycled", poisoned)


def operands(dtype=torch.float64, tokens=N, hidden=D, vocab=V):
    shapes = ((tokens, hidden), (vocab, hidden), (vocab,))
    hidden, weight, bias = (torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)
    return hidden, weight, bias, torch.randint(vocab, (tokens,))


def plain(hidden, weight, bias, target, normaliser):
    log_p = log_normalise(F.linear(hidden, weight, bias), normaliser)
    return -log_p.gather(1, target[:, None]).squeeze(1)


def some_zero(tokens=N):
    upstream = torch.randn(tokens, dtype=torch.float64)
    upstream[::3] = 0
    return upstream


@for_every_normaliser
def test_per_token_values_and_gradients(backend, normaliser):
    *tensors, target = operands()
    actual = normalised_cross_entropy(*tensors, target, normaliser, backend=backend)
    expected = plain(*tensors, target, normaliser)
    upstream = some_zero()
    assert_close(actual, expected, 1e-12)
    assert_close(*(torch.autograd.grad(nll, tensors, upstream) for nll in (actual, expected)), 1e-12)
    *few, word = operands(tokens=2)
    assert torch.autograd.gradcheck(lambda *x: normalised_cross_entropy(*x, word, normaliser, backend=backend), few)


@kept_or_not
@for_every_normaliser
def test_weighted_sum_and_gradients(backend, normaliser, kept, monkeypatch):
    monkeypatch.setattr(native, "KEPT", kept)
    *tensors, target = operands()
    weight = some_zero().requires_grad_()
    actual = normalised_cross_entropy_loss(*tensors, target, weight, normaliser, backend=backend)
    expected = (weight * plain(*tensors, target, normaliser)).sum()
    upstream = torch.tensor(-2.5, dtype=torch.float64)
    assert_close(actual, expected, 1e-12)
    assert_close(*(torch.autograd.grad(loss, [*tensors, weight], upstream) for loss in (actual, expected)), 1e-12)


def test_the_exponential_is_the_softmax(backend):
    *tensors, target = operands()
    weight = some_zero()
    losses = (
        normalised_cross_entropy_loss(*tensors, target, weight, Exponential(), backend=backend),
        linear_cross_entropy_loss(*tensors, target, weight, backend=backend),
    )
    assert_close(*losses, 1e-13)
    assert_close(*(torch.autograd.grad(loss, tensors) for loss in losses), 1e-13)
    assert_close(
        normalised_cross_entropy(*tensors, target, Exponential(), backend=backend),
        linear_cross_entropy(*tensors, target, backend=backend),
        1e-13,
    )


@pytest.mark.parametrize("wanted", range(4))
def test_one_gradient_alone_and_without_bias(backend, wanted):
    hidden, weight, bias, target = operands()
    token_weight = some_zero().requires_grad_()
    variables = [hidden, weight, bias, token_weight]
    for i, variable in enumerate(variables):
        variable.requires_grad_(i == wanted)
    for given in (bias, None):
        if variables[wanted] is bias and given is None:
            continue
        nll = plain(hidden, weight, given, target, Taylor())
        loss = normalised_cross_entropy_loss(hidden, weight, given, target, token_weight, Taylor(), backend=backend)
        expected = torch.autograd.grad((token_weight * nll).sum(), variables[wanted], retain_graph=True)
        assert_close(torch.autograd.grad(loss, variables[wanted]), expected, 1e-12)
        if wanted < 3:
            actual = normalised_cross_entropy(hidden, weight, given, target, Taylor(), backend=backend)
            expected = torch.autograd.grad(nll.sum(), variables[wanted])
            assert_close(torch.autograd.grad(actual.sum(), variables[wanted]), expected, 1e-12)


@for_every_normaliser
def test_no_tokens(backend, normaliser):
    *tensors, target = operands(tokens=0)
    assert normalised_cross_entropy(*tensors, target, normaliser, backend=backend).shape == (0,)
    loss = normalised_cross_entropy_loss(
        *tensors, target, torch.ones(0, dtype=torch.float64), normaliser, backend=backend
    )
    assert loss == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, tensors))


def test_the_weighted_sum_is_differentiated_once(backend):
    *tensors, target = operands()
    loss = normalised_cross_entropy_loss(*tensors, target, some_zero(), Taylor(), backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once; use the per-token one"):
        loss.backward()


def test_no_array_holds_a_score_per_token_and_word(backend):
    *tensors, target = operands()
    ones = torch.ones(N, dtype=torch.float64)
    for normaliser in (Spherical(0.1), Taylor(), Sigmoidal()):
        with LargestResult() as largest:
            normalised_cross_entropy(*tensors, target, normaliser, backend=backend).sum().backward()
            normalised_cross_entropy_loss(*tensors, target, ones, normaliser, backend=backend).backward()
        assert largest.entries <= max(reference.BLOCK // 2, V * D) < N * V


# -- digits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [0.3, 12.0, 60.0, 1e4, 1e9, -30.0, -200.0])
@for_every_normaliser
def test_gradients_keep_their_digits_as_p_goes_to_one(backend, normaliser, largest):
    """One score far above the others, or far below them in what the exponentials see."""
    scores = torch.tensor([[largest, 1e-3, -2e-3, 5e-4]])
    if largest < 0:
        scores[:, 1:] += 2 * largest
    target = torch.tensor([0])
    exact = scores.double().requires_grad_()
    found = scores.clone().requires_grad_()
    identity = torch.eye(4)
    nll = normalised_cross_entropy(found, identity, None, target, normaliser, backend=backend)
    (gradient,) = torch.autograd.grad(nll, found)
    others = torch.logsumexp(normaliser.log_weight(exact[:, 1:]), 1)
    truth = F.softplus(others - normaliser.log_weight(exact[:, 0]), threshold=1e9)
    (expected,) = torch.autograd.grad(truth, exact)
    smallest = torch.finfo(torch.float32).smallest_normal
    torch.testing.assert_close(nll.double(), truth, rtol=1e-4, atol=smallest)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max() + smallest)
    torch.testing.assert_close(gradient[:, 0].double(), expected[:, 0], rtol=1e-4, atol=smallest)


@for_every_normaliser
def test_nothing_overflows(backend, normaliser):
    for big in (50.0, 1e38):  # three times that is still a number
        scores = torch.tensor([[big, -big, 0.0], [-big, -big, -big], [big, big, -1.0], [0.0, 1e-30, -1e-38]])
        for target in range(3):
            words = torch.full((4,), target)
            x = scores.clone().requires_grad_()
            nll = normalised_cross_entropy(x, torch.eye(3), None, words, normaliser, backend=backend)
            ones = nll.detach().isfinite().float()
            loss = normalised_cross_entropy_loss(x, torch.eye(3), None, words, ones, normaliser, backend=backend)
            for value in (nll[nll.isfinite()].sum(), loss if ones.all() else nll[0] * 0):
                assert torch.autograd.grad(value, x, retain_graph=True)[0].isfinite().all()
            assert not nll.isnan().any()
            exact = plain(scores.double(), torch.eye(3).double(), None, words, normaliser)
            # C++ has its sums as logarithms, and that of a number near exp(1e38) does not tell three words from one.
            if backend == "eager" or big < 1e38 or not isinstance(normaliser, Exponential | Sigmoidal):
                assert_close(nll.double(), exact, 1e-5)


@pytest.mark.parametrize("falls", [False, True], ids=["rising", "falling"])
@kept_or_not
@for_every_other_normaliser
def test_the_largest_score_may_come_at_any_place(backend, normaliser, kept, falls, monkeypatch):
    """Weights are relative to a number that follows the largest score so far; here it moves many times."""
    monkeypatch.setattr(native, "KEPT", kept)
    vocab = 12 * 56  # strips of the kernel's widest registers
    # A move takes 16; where scores rise by hardly more from strip to strip, what came before still counts.
    spread = torch.linspace(-290.0, -50.0, vocab, dtype=torch.float64)
    bias = spread if isinstance(normaliser, Sigmoidal) else torch.exp(spread / 4 + 60) * (3 * spread).sin().sign()
    hidden, weight, _, target = operands(tokens=40, vocab=vocab)
    variables = (hidden, weight, (bias.flip(0) if falls else bias).requires_grad_())
    upstream = some_zero(40)
    expected = plain(*variables, target, normaliser)
    truth = slopes(expected, variables, upstream)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        given = [x.detach().to(dtype).requires_grad_() for x in variables]
        nll = normalised_cross_entropy(*given, target, normaliser, backend=backend)
        loss = normalised_cross_entropy_loss(*given, target, upstream.to(dtype), normaliser, backend=backend)
        assert (nll - expected).norm() <= tolerance * expected.norm()
        for found in (slopes(nll, given, upstream.to(dtype)), torch.autograd.grad(loss, given)):
            for gradient, true in zip(found, truth, strict=True):
                assert (gradient - true).norm() <= tolerance * true.norm()
            # A word that is nobody's target has what it adds to the sums, however little that is.
            torch.testing.assert_close(found[2].double(), truth[2], rtol=tolerance, atol=1e-30)


def test_words_that_are_ruled_out(backend):
    """Scores of -inf have no weight in the sigsoftmax."""
    hidden, weight, bias, _ = operands()
    with torch.no_grad():
        bias[2:9] = -torch.inf
    target, ones = torch.randint(2, (N,)), torch.ones(N, dtype=torch.float64)
    variables = (hidden, weight, bias)
    kept = torch.tensor([0, 1, *range(9, V)])
    expected = plain(hidden, weight[kept], bias[kept], target, Sigmoidal())
    actual = normalised_cross_entropy(*variables, target, Sigmoidal(), backend=backend)
    assert_close(actual, expected, 1e-12)
    loss = normalised_cross_entropy_loss(*variables, target, ones, Sigmoidal(), backend=backend)
    for found in (slopes(actual, variables, ones), torch.autograd.grad(loss, variables)):
        assert_close(found, slopes(expected, variables, ones), 1e-12)


@for_every_normaliser
def test_what_is_no_number_stays_none(backend, normaliser):
    hidden, weight, bias, target = operands()
    with torch.no_grad():
        hidden[4, 1] = torch.nan
    nll = normalised_cross_entropy(hidden, weight, bias, target, normaliser, backend=backend)
    assert nll.isnan().nonzero().flatten().tolist() == [4]
    ones = torch.ones(N, dtype=torch.float64)
    loss = normalised_cross_entropy_loss(hidden, weight, bias, target, ones, normaliser, backend=backend)
    assert loss.isnan()
    assert torch.autograd.grad(loss, weight)[0].isnan().all()


# -- shapes and precisions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
@kept_or_not
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@for_every_other_normaliser
@pytest.mark.usefixtures("poison")
def test_awkward_shapes(backend, normaliser, shape, kept, threads, monkeypatch):
    """By blocks whose weights are kept for the gradients or not, by more threads than there are words."""
    monkeypatch.setattr(native, "KEPT", kept)
    torch.set_num_threads(threads)
    *tensors, target = operands(torch.float64, *shape)
    upstream = some_zero(shape[0])
    expected = plain(*tensors, target, normaliser)
    truth = slopes(expected, tensors, upstream)
    actual = normalised_cross_entropy(*tensors, target, normaliser, backend=backend)
    loss = normalised_cross_entropy_loss(*tensors, target, upstream, normaliser, backend=backend)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(loss, (upstream * expected).sum())
    torch.testing.assert_close(slopes(actual, tensors, upstream), truth)
    torch.testing.assert_close(torch.autograd.grad(loss, tensors), truth)


@kept_or_not
@pytest.mark.parametrize("precision", ["float32", "bfloat16 table", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@for_every_other_normaliser
@pytest.mark.usefixtures("poison")
def test_awkward_shapes_in_less_precision(backend, normaliser, shape, precision, kept, monkeypatch):
    """In bfloat16 not further off than what PyTorch makes of the same operands."""
    monkeypatch.setattr(native, "KEPT", kept)
    hidden, weight, bias, target = operands(torch.float32, *shape)
    hidden = (0.3 * hidden).detach().requires_grad_()
    if precision == "bfloat16 table":
        weight = weight.detach().bfloat16()
        weight = (weight.float() if backend == "eager" else weight).requires_grad_()  # PyTorch multiplies equals only
    variables = (hidden, weight, bias)
    upstream = some_zero(shape[0]).float()
    exact = [x.detach().double().requires_grad_() for x in variables]
    expected = plain(*exact, target, normaliser)
    truth = slopes(expected, exact, upstream.double())
    allowed, others = 3e-6 * expected.norm(), [None] * 3
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        actual = normalised_cross_entropy(*variables, target, normaliser, backend=backend)
        loss = normalised_cross_entropy_loss(*variables, target, upstream, normaliser, backend=backend)
        if precision == "bfloat16":
            eager = plain(*variables, target, normaliser)
            allowed, others = 1.2 * (eager - expected).norm() + 1e-3, slopes(eager, variables, upstream)
    assert actual.dtype == loss.dtype == torch.float32
    assert (actual - expected).norm() <= allowed
    for found in (slopes(actual, variables, upstream), torch.autograd.grad(loss, variables)):
        for gradient, other, true, like in zip(found, others, truth, variables, strict=True):
            assert gradient.dtype == like.dtype
            if other is None:
                tolerance = 1e-2 if like.dtype == torch.bfloat16 else 1e-5
                assert (gradient - true).norm() <= tolerance * true.norm() + 1e-12
            else:
                assert (gradient - true).norm() <= 1.2 * (other - true).norm() + 4e-3 * true.norm()


def test_strided_inputs(backend):
    hidden = torch.randn(D, 2 * N, dtype=torch.float64).T[::2].requires_grad_()
    weight = torch.randn(D, V, dtype=torch.float64).T.requires_grad_()
    bias = torch.randn(1, dtype=torch.float64).expand(V).requires_grad_()
    target, token_weight = torch.randint(V, (2 * N,))[::2], torch.tensor(0.3, dtype=torch.float64).expand(N)
    variables = (hidden, weight, bias)
    for normaliser in (Spherical(0.3), Taylor(), Sigmoidal()):
        expected = slopes(plain(*variables, target, normaliser), variables, token_weight)
        nll = normalised_cross_entropy(*variables, target, normaliser, backend=backend)
        loss = normalised_cross_entropy_loss(*variables, target, token_weight, normaliser, backend=backend)
        assert_close(slopes(nll, variables, token_weight), expected, 1e-12)
        assert_close(torch.autograd.grad(loss, variables), expected, 1e-12)


# -- work -------------------------------------------------------------------------------------------------------------


@for_every_other_normaliser
def test_operations_are_counted(backend, normaliser):
    """Three products for the loss, four by the token, one without gradients."""
    *tensors, target = operands()
    ones = torch.ones(N, dtype=torch.float64)

    def products(step):
        with FlopCounterMode(display=False) as counter:
            step()
        return counter.get_total_flops() / (2 * N * D * V)

    def nll():
        return normalised_cross_entropy(*tensors, target, normaliser, backend=backend)

    def loss():
        return normalised_cross_entropy_loss(*tensors, target, ones, normaliser, backend=backend)

    in_place = 1 if backend == "eager" else 0  # a product that adds in place is missing in torch's own table
    assert products(loss) == 3 - in_place
    assert products(lambda: nll().sum().backward()) == 4 - in_place
    with torch.no_grad():
        assert products(nll) == products(loss) == 1


# -- bad input --------------------------------------------------------------------------------------------------------


class Cubes:
    """A normaliser that no kernel knows: ``f = |x|^3 + 1``."""

    def log_weight(self, score):
        return (score.abs() ** 3 + 1).log()

    def slope(self, score):
        return 3 * score * score.abs() / (score.abs() ** 3 + 1)

    def weigh(self, score):
        return score.abs() ** 3 + 1, 3 * score * score.abs(), torch.zeros_like(score[:, :1])

    def scores(self, log_prob):
        return log_prob


def test_a_normaliser_that_no_kernel_knows_is_for_eager():
    *tensors, target = operands()
    expected = plain(*tensors, target, Cubes())
    for backend in ("auto", "eager"):
        assert_close(normalised_cross_entropy(*tensors, target, Cubes(), backend=backend), expected, 1e-12)
    if NORMALISED_BACKENDS.obstacles["cpp"](torch.device("cpu")) is None:
        with pytest.raises(ValueError, match=r"^backend='cpp' does not know .*Cubes.*; choose eager"):
            normalised_cross_entropy(*tensors, target, Cubes(), backend="cpp")


def test_what_does_not_fit_is_named(backend):
    hidden, weight, bias, target = operands()
    with pytest.raises(ValueError, match="^bias has shape"):
        normalised_cross_entropy(hidden, weight, bias[1:], target, Taylor(), backend=backend)
    with pytest.raises(ValueError, match=r"^backend='none': choose one of auto, cpp, eager"):
        normalised_cross_entropy(hidden, weight, bias, target, Taylor(), backend="none")
    target[3] = V
    with pytest.raises((ValueError, RuntimeError), match=r"must be in \[0, 13\)|out of bounds"):
        normalised_cross_entropy(hidden, weight, bias, target, Taylor(), backend=backend)
