"""Sparsemax, entmax and their losses: against the papers' algorithms, closed forms, limits, derivatives."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import assert_close

from lvsoftmax.ops import sparse
from lvsoftmax.ops.sparse import (
    entmax,
    entmax15,
    entmax_jacobian_product,
    entmax_loss,
    full_support_logits,
    log_entmax,
    sparsemax,
    sparsemax_loss,
)

ALPHAS = [1.05, 1.3, 1.5, 1.7, 2.0, 2.5, 4.0]
LONG = 5003  # a row of which entries are listed, and not a multiple of anything

for_every_alpha = pytest.mark.parametrize("alpha", ALPHAS)


def normal(*shape, scale=1.0, dtype=torch.float64):
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype)


def bisected(row: np.ndarray, alpha: float) -> np.ndarray:
    """The definition: the threshold at which what is above it sums to 1, closed in on in float64."""
    scores = (alpha - 1) * row
    low, high = scores.max() - 1, scores.max()
    for _ in range(200):
        tau = (low + high) / 2
        total = (np.maximum(scores - tau, 0) ** (1 / (alpha - 1))).sum()
        low, high = (tau, high) if total > 1 else (low, tau)
    return np.maximum(scores - low, 0) ** (1 / (alpha - 1))


def sorted_sparsemax(row: np.ndarray) -> np.ndarray:
    """Martins & Astudillo 2016, algorithm 1."""
    z = np.sort(row)[::-1]
    k = max(k for k in range(1, len(z) + 1) if 1 + k * z[k - 1] > z[:k].sum())
    return np.maximum(row - (z[:k].sum() - 1) / k, 0)


def sorted_entmax15(row: np.ndarray) -> np.ndarray:
    """Peters, Niculae & Martins 2019, algorithm 2."""
    z = np.sort(row / 2)[::-1]
    for k in range(1, len(z) + 1):
        mean, spread = z[:k].mean(), ((z[:k] - z[:k].mean()) ** 2).sum()
        tau = mean - math.sqrt(max(1 - spread, 0) / k)
        if (k == len(z) or z[k] <= tau) and tau <= z[k - 1]:
            return np.maximum(row / 2 - tau, 0) ** 2
    raise AssertionError


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("size", [2, 97, LONG])
@for_every_alpha
def test_equals_the_definition(alpha, size, scale):
    logits = normal(3, size, scale=scale)
    expected = np.stack([bisected(row, alpha) for row in logits.numpy()])
    tolerance = 1e-10 if alpha <= 2 else 1e-6  # the definition's own rounding
    assert_close(entmax(logits, alpha), torch.from_numpy(expected), tolerance)
    assert_close(entmax(logits, alpha).sum(1), torch.ones(3, dtype=torch.float64), 1e-12)
    single = entmax(logits.float(), alpha)
    assert_close(single.double(), torch.from_numpy(expected), 1e-5 if alpha <= 2 else 1e-3)
    assert_close(single.sum(1), torch.ones(3), 1e-5)
    assert torch.equal(log_entmax(logits, alpha), entmax(logits, alpha).log())


@pytest.mark.parametrize(("function", "algorithm"), [(sparsemax, sorted_sparsemax), (entmax15, sorted_entmax15)])
@pytest.mark.parametrize("size", [2, 97, 1100])
def test_equals_the_sorting_algorithm(function, algorithm, size):
    for scale in (0.1, 3.0):
        logits = normal(3, size, scale=scale)
        expected = np.stack([algorithm(row) for row in logits.numpy()])
        assert_close(function(logits), torch.from_numpy(expected), 1e-12)


@pytest.mark.parametrize("alpha", [*ALPHAS, 20.0])
def test_two_entries_in_closed_form(alpha):
    """``p^a - (1 - p)^a = a d`` for a difference of d between the logits, a = alpha - 1."""
    a = alpha - 1
    p = torch.linspace(0.5, 0.9, 5, dtype=torch.float64)
    logits = torch.stack([(p**a - (1 - p) ** a) / a, torch.zeros_like(p)], 1)
    found = entmax(logits, alpha)
    assert_close(found.sum(1), torch.ones_like(p), 1e-12)
    # At alpha = 20 a difference of one float between the logits moves the smaller probability by 0.1.
    assert_close(found[:, 0], p, 1e-10 if alpha < 5 else 0.05)
    apart = torch.tensor([[1 / a, 0.0], [0.0, 2 / a]])
    assert torch.equal(entmax(apart, alpha), torch.eye(2))


def test_numbers_of_the_reference_implementation():
    """From the README of the authors' package."""
    logits = torch.tensor([-2.0, 0.0, 0.5])
    assert_close(sparsemax(logits), torch.tensor([0.0, 0.25, 0.75]), 1e-6)
    assert_close(entmax15(logits), torch.tensor([0.0, 0.3260, 0.6740]), 1e-4)


@for_every_alpha
def test_alike_logits_share_equally(alpha):
    for size in (2, 97, LONG):
        assert_close(entmax(torch.full((2, size), 7.0), alpha), torch.full((2, size), 1 / size), 1e-6)
    logits = normal(4, 97)
    logits[:, 5] = logits[:, 9] = logits.amax(1) + 0.01
    p = entmax(logits, alpha)
    assert torch.equal(p[:, 5], p[:, 9]) and (p[:, 5] == p.amax(1)).all()


def test_limits():
    logits = normal(5, 97, dtype=torch.float32)
    assert_close(entmax(logits, 1 + 1e-6), logits.softmax(1), 1e-5)
    top = F.one_hot(logits.argmax(1), 97).float()
    assert_close(entmax(logits, 1e6), top, 1e-6)
    assert_close(entmax(1e4 * logits, 1.5), top, 0.0)


@for_every_alpha
def test_what_is_added_to_all_logits_and_their_order_do_not_matter(alpha):
    logits, order = normal(3, LONG), torch.randperm(LONG)
    assert_close(entmax(logits + 100, alpha), entmax(logits, alpha), 1e-10)
    assert_close(entmax(logits[:, order], alpha), entmax(logits, alpha)[:, order], 1e-12)


@for_every_alpha
def test_an_entry_at_minus_infinity_is_left_out(alpha):
    for size in (11, LONG):
        logits = normal(3, size)
        without = entmax(logits[:, 1:-1], alpha)
        logits[:, [0, -1]] = -torch.inf
        assert_close(entmax(logits, alpha), F.pad(without, (1, 1)), 1e-12)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.2])
def test_supports_of_any_width_in_one_call(alpha):
    """One word, some, and all of the entries."""
    logits = torch.stack([normal(LONG, scale=100.0), normal(LONG), normal(LONG, scale=1e-5), torch.zeros(LONG)])
    expected = np.stack([bisected(row, alpha) for row in logits.double().numpy()])
    for rows in ([0, 1], [0, 1, 2, 3], [2, 3]):
        assert_close(entmax(logits[rows], alpha), torch.from_numpy(expected[rows]), 1e-10)
    assert (expected[0] > 0).sum() < 3 and (expected[3] > 0).all()


def test_listing_entries_reads_each_of_them_once_and_leaves_none_of_the_support_out():
    logits = normal(3, LONG)
    entries, probability, _ = sparse.solve(logits, 2.0)
    assert entries.place_P is not None and len(entries.place_P) < 3 * LONG / 50
    assert (probability > 0).sum() == (sparsemax(logits) > 0).sum()
    listed = torch.tensor([[4], [LONG - 1], [0]])
    entries, probability, _ = sparse.solve(logits - 100 * F.one_hot(listed.squeeze(1), LONG), 2.0, listed)
    assert set((torch.arange(3) * LONG + listed.squeeze(1)).tolist()) <= set(entries.place_P.tolist())
    assert entries.size_N.sum() == len(entries.place_P)


# -- shapes and precisions --------------------------------------------------------------------------------------------


@for_every_alpha
def test_any_dimension_and_shape(alpha):
    logits = normal(3, 4, 5)
    for dim in (0, 1, 2, -1, -3):
        rows = logits.movedim(dim, -1)
        expected = torch.stack([entmax(row, alpha) for row in rows.reshape(-1, rows.shape[-1])])
        assert_close(entmax(logits, alpha, dim), expected.view(rows.shape).movedim(-1, dim), 1e-12)
        target = torch.randint(logits.shape[dim], rows.shape[:-1])
        one_hot = F.one_hot(target, logits.shape[dim]).double()
        loss = entmax_loss(logits, target, alpha, dim)
        assert_close(loss, entmax_loss(rows, one_hot, alpha), 1e-12)
        assert_close(loss, entmax_loss(logits, one_hot.movedim(-1, dim), alpha, dim), 1e-12)
    assert entmax(normal(0, 7), alpha).shape == (0, 7)
    assert entmax(normal(0, LONG), alpha).shape == (0, LONG)
    assert entmax(normal(7), alpha).shape == (7,)
    assert_close(entmax(normal(3, 1), alpha), torch.ones(3, 1, dtype=torch.float64), 1e-12)


def test_low_precision_in_float32_out():
    logits = normal(3, LONG, dtype=torch.bfloat16)
    for function in (sparsemax, entmax15, log_entmax):
        assert function(logits).dtype == torch.float32
        assert torch.equal(function(logits), function(logits.float()))
    assert sparsemax_loss(logits, torch.zeros(3).long()).dtype == torch.float32
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(entmax15(logits).square().sum(), logits)
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("alpha", [1.0, 0.5, -1.0, math.inf, math.nan])
def test_alpha_out_of_range(alpha):
    logits, target = normal(2, 3), torch.tensor([0, 1])
    for function in (
        lambda: entmax(logits, alpha),
        lambda: log_entmax(logits, alpha),
        lambda: entmax_loss(logits, target, alpha),
        lambda: entmax_jacobian_product(logits, logits, alpha),
    ):
        with pytest.raises(ValueError, match=f"alpha={alpha}: must be in"):
            function()


# -- derivatives ------------------------------------------------------------------------------------------------------


@for_every_alpha
def test_derivatives_of_first_and_second_order(alpha):
    logits = normal(5, 2).requires_grad_()
    target = torch.randint(5, (2,))
    inside = entmax(logits, alpha, 0) > 0
    assert not inside.all() or alpha < 1.5
    for function in (
        lambda z: entmax(z, alpha, 0),
        lambda z: log_entmax(z, alpha, 0)[inside],
        lambda z: entmax_loss(z, target, alpha, 0),
    ):
        assert torch.autograd.gradcheck(function, logits)
        assert torch.autograd.gradgradcheck(function, logits)


@pytest.mark.parametrize("shape", [(), (1,), (3, 1)])
def test_derivatives_by_alpha(shape):
    logits = normal(3, 4).requires_grad_()
    alpha = (1.1 + 2.5 * torch.rand(shape, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(entmax, (logits, alpha))
    assert torch.autograd.gradgradcheck(entmax, (logits, alpha))
    if len(shape) == 2:
        assert torch.autograd.gradcheck(lambda z, a: entmax(z, a, 0), (logits.T, alpha.T))


@for_every_alpha
def test_a_tensor_alpha_gives_what_a_number_does(alpha):
    for size in (97, LONG):
        logits = normal(3, size)
        assert_close(entmax(logits, torch.tensor(alpha, dtype=torch.float64)), entmax(logits, alpha), 1e-10)


@for_every_alpha
def test_the_jacobian_product_from_either_side(alpha):
    logits, vector = normal(97, scale=0.5), normal(97)
    jacobian = torch.autograd.functional.jacobian(lambda z: entmax(z, alpha), logits)
    product = entmax_jacobian_product(logits, vector, alpha)
    assert_close(product, jacobian @ vector, 1e-10)
    assert_close(product, vector @ jacobian, 1e-10)
    assert not product[entmax(logits, alpha) == 0].any()
    batch = normal(2, 5, 3)
    assert_close(
        entmax_jacobian_product(batch, batch, alpha, 1),
        entmax_jacobian_product(batch.mT, batch.mT, alpha).mT,
        1e-12,
    )


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0])
def test_logarithms_have_gradients_on_the_support_only_and_never_a_nan(alpha):
    logits = normal(4, 97).requires_grad_()
    log_p = log_entmax(logits, alpha)
    outside = log_p == -torch.inf
    assert outside.any(1).all()
    (gradient,) = torch.autograd.grad(log_p, logits, normal(4, 97))
    assert gradient.isfinite().all() and not gradient[outside].any() and gradient[~outside].any()
    (of_outside,) = torch.autograd.grad(log_entmax(logits, alpha)[outside].sum(), logits)
    assert not of_outside.any()


# -- Fenchel-Young losses ---------------------------------------------------------------------------------------------


def tsallis(p: torch.Tensor, alpha: float) -> torch.Tensor:
    return (p - p**alpha).sum(-1) / (alpha * (alpha - 1))


@for_every_alpha
def test_the_loss_is_what_its_definition_says(alpha):
    """The maximum over p is at the entmax: no distribution tried does better."""
    logits, target = normal(5, 97), normal(5, 97).softmax(1)
    p = entmax(logits, alpha)
    loss = entmax_loss(logits, target, alpha)
    rest = (target * logits).sum(1) + tsallis(target, alpha)
    assert_close(loss, (p * logits).sum(1) + tsallis(p, alpha) - rest, 1e-10)
    others = torch.cat([normal(500, 5, 97, scale=3.0).softmax(2), p + 0.01 * (normal(500, 5, 97).softmax(2) - p)])
    assert ((others * logits).sum(-1) + tsallis(others, alpha) - rest <= loss + 1e-12).all()


@for_every_alpha
def test_the_gradient_of_the_loss_is_p_minus_y(alpha):
    logits, target = normal(5, 97).requires_grad_(), torch.randint(97, (5,))
    upstream = normal(5)
    (gradient,) = torch.autograd.grad(entmax_loss(logits, target, alpha), logits, upstream)
    assert_close(gradient, upstream[:, None] * (entmax(logits, alpha) - F.one_hot(target, 97)).detach(), 1e-12)


@for_every_alpha
def test_the_loss_is_never_negative_and_zero_at_its_optimum_alone(alpha):
    logits = normal(200, 11, scale=3.0, dtype=torch.float32)
    best = logits.argmax(1)
    assert (entmax_loss(logits, best, alpha) >= 0).all()
    y = entmax(logits, alpha)
    assert_close(entmax_loss(logits, y, alpha), torch.zeros(200), 1e-5)
    away = y.roll(1, 1)
    assert (entmax_loss(logits, away, alpha) > 1e-3).all()
    # a margin of 1 / (alpha - 1) over the others is enough for a loss of exactly zero
    sure = normal(20, 11)
    sure[torch.arange(20), best[:20]] = sure.amax(1) + 1.0001 / (alpha - 1)
    assert not entmax_loss(sure, best[:20], alpha).any()


def test_the_sparsemax_loss_in_closed_form():
    """Martins & Astudillo 2016, section 3.2: ``-z_t + (sum over the support of z^2 - tau^2) / 2 + 1/2``."""
    logits, target = normal(5, 97), torch.randint(97, (5,))
    p = sparsemax(logits)
    tau = logits.amax(1, keepdim=True) - p.amax(1, keepdim=True)
    inside = ((logits**2 - tau**2) * (p > 0)).sum(1)
    expected = -logits.gather(1, target[:, None]).squeeze(1) + inside / 2 + 0.5
    assert_close(sparsemax_loss(logits, target), expected, 1e-10)
    two = torch.tensor([[1.5, 0.0], [0.4, 0.0], [-2.0, 0.0]])
    margin = two[:, 0]
    huber = torch.where(margin >= 1, 0.0, torch.where(margin <= -1, -margin, (margin - 1) ** 2 / 4))
    assert_close(sparsemax_loss(two, torch.zeros(3).long()), huber, 1e-6)


def test_near_alpha_1_the_loss_is_the_cross_entropy():
    logits, target = normal(5, 97, dtype=torch.float32), torch.randint(97, (5,))
    assert_close(entmax_loss(logits, target, 1 + 1e-6), F.cross_entropy(logits, target, reduction="none"), 1e-4)


@for_every_alpha
def test_an_excluded_entry_leaves_the_loss_finite(alpha):
    logits, target = normal(3, 11), torch.tensor([1, 2, 3])
    expected = entmax_loss(logits[:, 1:], target - 1, alpha)
    logits[:, 0] = -torch.inf
    assert_close(entmax_loss(logits, target, alpha), expected, 1e-12)


@for_every_alpha
def test_logits_of_a_distribution(alpha):
    for size in (2, 97, LONG):
        p = normal(3, size, scale=2.0).softmax(1)
        assert_close(entmax(full_support_logits(p, alpha), alpha), p, 1e-10 if alpha < 4 else 1e-6)


# -- compilers --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("alpha", [1.5, 3.0])
def test_traced_whole(alpha):
    torch.compiler.reset()
    logits = normal(3, LONG).requires_grad_()
    target = torch.tensor([0, 1, 2])

    def function(z):
        return entmax(z, alpha).square().sum() + entmax_loss(z, target, alpha).sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_close(compiled(logits), function(logits), 1e-12)
    assert_close(torch.autograd.grad(compiled(logits), logits), torch.autograd.grad(function(logits), logits), 1e-12)
