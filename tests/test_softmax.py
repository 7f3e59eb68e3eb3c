"""The softmax: worked numbers, limits of the temperature, identities, derivatives, digits."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import assert_close

from lvsoftmax.ops.softmax import cross_entropy, log_softmax, logsumexp, softmax, softmax_jacobian
from lvsoftmax.ops.softmax import softmax_jacobian_product as product

TEMPERATURES = [1.0, 0.5, 3.0, -1.0, -0.7]


def vector(*numbers, dtype=torch.float32):
    return torch.tensor(numbers, dtype=dtype)


def oracle(logits, axis=-1, temperature=1.0):
    """The formula as it stands, in float64, for logits that need no care."""
    weight = np.exp(np.asarray(logits, np.float64) / temperature)
    return weight / weight.sum(axis, keepdims=True)


# -- worked numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "expected", "digits"),
    [
        ((1, 2, 8), (0.001, 0.002, 0.997), 3),
        (
            (1, 2, 3, 4, 1, 2, 3),
            (0.02364054, 0.06426166, 0.1746813, 0.474833, 0.02364054, 0.06426166, 0.1746813),
            7,
        ),
        ((2, 4, 2, 1), (0.1025, 0.7573, 0.1025, 0.0377), 4),
        ((0, 0.9, 0.1), (0.219, 0.539, 0.242), 3),
        ((0, 10), (0.00005, 0.99995), 5),
    ],
)
def test_worked_numbers(logits, expected, digits):
    for dtype in (torch.float32, torch.float64):
        found = softmax(vector(*logits, dtype=dtype)).tolist()
        assert found == pytest.approx(expected, abs=0.5 * 10**-digits)


def test_a_high_temperature_evens_out():
    assert softmax(vector(0, 10), temperature=100.0).tolist() == pytest.approx((0.475, 0.525), abs=5e-4)


def test_a_clear_winner_takes_all_of_float32():
    p = softmax(vector(100, 0, 0, 0))
    assert p[0] == 1 and (p[1:] < torch.finfo(torch.float32).smallest_normal).all()
    assert log_softmax(vector(100, 0, 0, 0)).tolist() == [0, -100, -100, -100]


# -- shapes and precisions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("shape", "dim"), [((5,), 0), ((2, 3), 0), ((2, 3), 1), ((2, 3, 4), 1), ((2, 3, 4), -2)])
def test_any_dimension_of_any_shape(shape, dim, temperature):
    logits = torch.randn(shape, dtype=torch.float64)
    expected = torch.from_numpy(oracle(logits, dim, temperature))
    assert_close(softmax(logits, dim, temperature=temperature), expected, 1e-14)
    assert_close(log_softmax(logits, dim, temperature=temperature), expected.log(), 1e-12)
    total = temperature * (logits / temperature).exp().sum(dim).log()
    assert_close(logsumexp(logits, dim, temperature=temperature), total, 1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.0, -2.0])
def test_precisions(temperature):
    logits = torch.randn(3, 1000, dtype=torch.float64)
    for function in (softmax, log_softmax, logsumexp):
        rounded = function(logits.bfloat16(), temperature=temperature)
        assert rounded.dtype == torch.float32
        assert torch.equal(rounded, function(logits.bfloat16().float(), temperature=temperature))
        assert function(logits.float(), temperature=temperature).dtype == torch.float32
        assert function(logits, temperature=temperature).dtype == torch.float64
    assert cross_entropy(logits.bfloat16(), torch.zeros(3, dtype=torch.int64)).dtype == torch.float32


def test_no_rows():
    assert softmax(torch.zeros(0, 3), temperature=2.0).shape == (0, 3)
    assert logsumexp(torch.zeros(3, 0), 0, temperature=0.0).shape == (0,)


# -- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1e4, -1e4])
@pytest.mark.parametrize("temperature", [*TEMPERATURES, 0.0])
def test_a_shift_changes_nothing(shift, temperature):
    logits = vector(-3, 0, 0.5, 1)  # shifted without rounding
    shifted = logits + shift
    assert torch.equal(softmax(shifted, temperature=temperature), softmax(logits, temperature=temperature))
    moved = logsumexp(shifted.double(), temperature=temperature) - shift
    assert_close(moved, logsumexp(logits.double(), temperature=temperature), 1e-11)
    target = torch.tensor(2)
    assert_close(cross_entropy(shifted.double(), target), cross_entropy(logits.double(), target), 1e-11)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_two_classes_are_a_sigmoid(temperature):
    score = torch.linspace(-30, 30, 61, dtype=torch.float64)
    logits = torch.stack([score, torch.zeros_like(score)])
    assert_close(softmax(logits, 0, temperature=temperature)[0], torch.sigmoid(score / temperature), 1e-14)
    assert_close(log_softmax(logits, 0, temperature=temperature)[0], F.logsigmoid(score / temperature), 1e-13)


@pytest.mark.parametrize("base", [2.0, math.e, 10.0, 0.5])
def test_a_base_is_a_temperature(base):
    logits = torch.randn(4, 5, dtype=torch.float64)
    weight = base**logits
    assert_close(softmax(logits, base=base), weight / weight.sum(1, keepdim=True), 1e-14)
    assert_close(logsumexp(logits, base=base), weight.sum(1).log() / math.log(base), 1e-13)
    assert_close(log_softmax(logits, base=base), log_softmax(logits, temperature=1 / math.log(base)), 1e-14)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_log_softmax_is_what_logsumexp_leaves(temperature):
    logits = torch.randn(4, 5, dtype=torch.float64)
    left = (logits - logsumexp(logits, temperature=temperature)[:, None]) / temperature
    assert_close(log_softmax(logits, temperature=temperature), left, 1e-13)


# -- limits of the temperature ----------------------------------------------------------------------------------------


def test_temperature_zero_is_argmax_and_ties_share():
    logits = torch.tensor([[1.0, 3.0, 2.0], [3.0, 1.0, 3.0], [2.0, 2.0, 2.0]])
    expected = torch.tensor([[0, 1, 0], [0.5, 0, 0.5], [1 / 3, 1 / 3, 1 / 3]])
    for argmax in (softmax(logits, temperature=0.0), softmax(logits, base=math.inf)):
        assert_close(argmax, expected, 1e-7)
    assert_close(log_softmax(logits, temperature=0.0), expected.log(), 1e-7)
    assert_close(softmax(logits.T, 0, temperature=0.0), expected.T, 1e-7)
    assert logsumexp(logits, temperature=0.0).tolist() == [3, 3, 2]


def test_temperature_zero_from_below_is_argmin():
    logits = vector(1, 3, 1)
    assert softmax(logits, temperature=-0.0).tolist() == softmax(logits, base=0.0).tolist() == [0.5, 0, 0.5]
    assert logsumexp(logits, temperature=-0.0) == 1


def test_an_infinite_temperature_is_uniform_over_what_is_allowed():
    logits = vector(5, -3, 1, -math.inf)
    for even in (
        softmax(logits, temperature=math.inf),
        softmax(logits, temperature=-math.inf),
        softmax(logits, base=1.0),
    ):
        assert_close(even, vector(1, 1, 1, 0) / 3, 1e-7)


def test_a_negative_temperature_is_softargmin():
    logits = torch.randn(4, 5)
    assert_close(softmax(logits, temperature=-2.0), softmax(-logits, temperature=2.0), 1e-7)


def test_the_limits_are_limits():
    logits = torch.tensor([[1.0, 3.0, 2.0], [3.0, 1.0, 3.0]], dtype=torch.float64)
    for limit, near in ((0.0, 1e-3), (-0.0, -1e-3), (math.inf, 1e9), (-math.inf, -1e9)):
        assert_close(softmax(logits, temperature=near), softmax(logits, temperature=limit), 1e-8)
    assert_close(logsumexp(logits, temperature=1e-9), logsumexp(logits, temperature=0.0), 1e-8)


def test_neighbours_go_to_opposite_corners():
    near = torch.tensor([[1, 1.0001], [1, 0.9999]], dtype=torch.float64)
    assert_close(softmax(near), torch.full_like(near, 0.5), 1e-4)
    corners = torch.tensor([[0, 1], [1, 0]], dtype=torch.float64)
    for temperature in (1e-6, 1e-300, 0.0):
        assert_close(softmax(near, temperature=temperature), corners, 1e-12)


@pytest.mark.parametrize("temperature", [1e-38, -1e-38, 1e-3])
def test_a_low_temperature_does_not_overflow(temperature):
    logits = vector(1e5, 1, -1e5)
    p = softmax(logits, temperature=temperature)
    assert torch.equal(p, vector(1, 0, 0) if temperature > 0 else vector(0, 0, 1))
    assert logsumexp(logits, temperature=temperature) == (1e5 if temperature > 0 else -1e5)


def test_logits_of_any_size():
    logits = torch.tensor([[3e38, -3e38, 0], [-3e38, -3e38, -3e38], [-math.inf, 0, 0]])
    expected = torch.tensor([[1, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0, 0.5, 0.5]])
    for temperature in (1.0, 2.0):
        assert_close(softmax(logits, temperature=temperature), expected, 1e-6)
    assert logsumexp(logits).isfinite().all()


@pytest.mark.parametrize("function", [softmax, log_softmax, logsumexp, softmax_jacobian])
def test_bad_temperatures_are_named(function):
    logits = torch.randn(3)
    for options, message in (
        ({"temperature": math.nan}, "temperature=nan"),
        ({"base": -1.0}, "base=-1.0: must not be negative"),
        ({"base": math.nan}, "base=nan"),
        ({"base": 2.0, "temperature": 2.0}, "temperature=2.0 and base=2.0 say the same"),
    ):
        with pytest.raises(ValueError, match=message):
            function(logits, **options)


def test_where_there_is_no_limit():
    with pytest.raises(ValueError, match="temperature=inf: the log-sum-exp is infinite"):
        logsumexp(torch.randn(3), temperature=math.inf)
    for call in (softmax_jacobian, lambda x, temperature: product(x, x, temperature=temperature)):
        with pytest.raises(ValueError, match=r"temperature=0.0: argmax has no Jacobian"):
            call(torch.randn(3), temperature=0.0)


# -- derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("function", [softmax, log_softmax, logsumexp])
def test_differentiable_twice(function, temperature):
    logits = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)

    def run(x):
        return function(x, 1, temperature=temperature)

    assert torch.autograd.gradcheck(run, logits)
    assert torch.autograd.gradgradcheck(run, logits)


@pytest.mark.parametrize("function", [softmax, log_softmax, logsumexp])
def test_a_temperature_can_be_learned(function):
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor([[0.7], [-1.3]], dtype=torch.float64, requires_grad=True)

    def run(x, t):
        return function(x, temperature=t)

    assert torch.autograd.gradcheck(run, (logits, temperature))
    assert torch.autograd.gradgradcheck(run, (logits, temperature))
    for row in range(2):
        alone = function(logits[row], temperature=temperature[row].item())
        assert_close(function(logits, temperature=temperature)[row], alone, 1e-12)


@pytest.mark.parametrize("temperature", [*TEMPERATURES, 0.0, -0.0])
def test_the_gradient_of_logsumexp_is_softmax(temperature):
    logits = torch.tensor([[1.0, 3.0, 3.0, -2.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(logsumexp(logits, temperature=temperature).sum(), logits)
    assert_close(gradient, softmax(logits, temperature=temperature).detach(), 1e-14)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_the_jacobian_and_its_products(dim, temperature):
    logits, v = torch.randn(2, 3, 4, 3, dtype=torch.float64).unbind(0)
    jacobian = softmax_jacobian(logits, dim, temperature=temperature)
    rows, others = logits.movedim(dim, -1), v.movedim(dim, -1)
    expected = torch.stack(
        [
            torch.autograd.functional.jacobian(lambda z: softmax(z, temperature=temperature), row)
            for row in rows.reshape(-1, rows.shape[-1])
        ]
    )
    assert_close(jacobian.flatten(0, 1), expected, 1e-13)
    assert_close(jacobian, jacobian.mT, 1e-15)
    found = product(logits, v, dim, temperature=temperature)
    assert_close(found.movedim(dim, -1), (jacobian @ others[..., None]).squeeze(-1), 1e-13)
    assert_close(found.movedim(dim, -1), (others[..., None, :] @ jacobian).squeeze(-2), 1e-13)


def test_products_are_differentiable():
    logits, v = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True).unbind(0)
    inputs = (logits.detach().requires_grad_(), v.detach().requires_grad_())
    assert torch.autograd.gradcheck(lambda z, v: product(z, v, temperature=0.8), inputs)
    assert torch.autograd.gradcheck(lambda z: softmax_jacobian(z, temperature=0.8), inputs[:1])


def test_the_jacobian_keeps_its_digits_as_p_goes_to_one():
    logits = vector(25, 0, 1, -3)
    truth = softmax_jacobian(logits.double())
    torch.testing.assert_close(softmax_jacobian(logits).double(), truth, rtol=1e-5, atol=0.0)


# -- cross-entropy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_cross_entropy_and_its_gradient(dim):
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    shape = list(logits.shape)
    classes = shape.pop(dim)
    target = torch.randint(classes, shape)
    value = cross_entropy(logits, target, dim)
    assert_close(value, -log_softmax(logits, dim).gather(dim, target.unsqueeze(dim)).squeeze(dim), 1e-13)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    one_hot = F.one_hot(target, classes).movedim(-1, dim)
    assert_close(gradient, (softmax(logits, dim) - one_hot).detach(), 1e-13)
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, target, dim), logits)
    assert torch.autograd.gradgradcheck(lambda z: cross_entropy(z, target, dim), logits)


@pytest.mark.parametrize("margin", [5.0, 17.0, 25.0, 80.0])
def test_cross_entropy_keeps_its_digits_as_p_goes_to_one(margin):
    logits = torch.tensor([[margin, 0.0, 1.0, -3.0]], dtype=torch.float64)
    target, others = torch.tensor([0]), logits[0, 1:].exp() / math.exp(margin)
    single = logits.float().requires_grad_()
    value = cross_entropy(single, target)
    (gradient,) = torch.autograd.grad(value, single)
    missed = others.sum()
    truth = torch.cat([-missed[None], others]) / (1 + missed)
    torch.testing.assert_close(value.double(), torch.log1p(missed)[None], rtol=2e-5, atol=0.0)
    torch.testing.assert_close(gradient[0].double(), truth, rtol=2e-5, atol=0.0)


def test_cross_entropy_of_one_class_and_of_forbidden_classes():
    one = torch.zeros(2, 1, requires_grad=True)
    value = cross_entropy(one, torch.zeros(2, dtype=torch.int64))
    assert value.tolist() == [0, 0]
    assert not torch.autograd.grad(value.sum(), one)[0].any()
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    (gradient,) = torch.autograd.grad(cross_entropy(logits, torch.tensor([1])).sum(), logits)
    assert gradient.tolist() == [[0.5, -0.5, 0]]
    assert cross_entropy(logits, torch.tensor([2])) == math.inf


def test_cross_entropy_of_huge_logits():
    logits = torch.tensor([[3e38, 0.0], [-1e38, 1e38]], requires_grad=True)
    value = cross_entropy(logits, torch.tensor([0, 0]))
    assert value.tolist() == [0, pytest.approx(2e38)]
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert gradient.tolist() == [[0, 0], [-1, 1]]
