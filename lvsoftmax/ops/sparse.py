"""Sparse relatives of the softmax: sparsemax, alpha-entmax and their Fenchel-Young losses; sums in float32 at least.

For ``alpha > 1``, with ``a = alpha - 1``::

    entmax(z)_j = [a z_j - tau]_+ ^ (1 / a)          tau such that the sum is 1

``alpha = 2`` is sparsemax, and ``alpha -> 1`` the softmax. What is computed are the same numbers in a form that keeps
its digits for every alpha: with the largest probability P and ``s_j = a (z_j - max z)``, which is zero or less::

    p_j = P [1 + s_j / theta]_+ ^ (1 / a)            theta = P^a = a max z - tau

so that an entry is in the support where ``s_j > -theta``. Some entries alone would have a larger ``theta`` than all of
them together: that of the largest entry of each group is a bound for a long row, and a close one, so that a single look
at each entry leaves little more than the support to work with. Nothing is sorted.

Letters: N rows, V entries of a row, G groups of them, P listed entries, those of one row after those of the other.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lvsoftmax.ops.numerics import upcast

GROUP = 16  # entries represented by the largest of them
SLACK = 1.001  # on a bound, so that rounding leaves nothing out
FEW = 1 / 8  # of all entries: how many may be listed


def sparsemax(logits: Tensor, dim: int = -1) -> Tensor:
    """Return the projection of the logits onto the simplex: Martins & Astudillo 2016, From Softmax to Sparsemax."""
    return entmax(logits, 2.0, dim)


def entmax15(logits: Tensor, dim: int = -1) -> Tensor:
    """Return :func:`entmax` with ``alpha = 1.5``."""
    return entmax(logits, 1.5, dim)


def entmax(logits: Tensor, alpha: float | Tensor = 1.5, dim: int = -1) -> Tensor:
    """Return alpha-entmax: Peters, Niculae & Martins 2019, Sparse Sequence-to-Sequence Models, equation 10.

    Exact up to rounding. ``theta`` is found by Newton's method where that cannot fail, up to ``alpha = 2``, by
    bisection beyond.

    Args:
        logits: any shape; minus infinity leaves an entry out.
        alpha: above 1. A tensor broadcasts against ``logits``, has size 1 along ``dim``, is not checked, and gets a
            gradient: Correia, Niculae & Martins 2019, Adaptively Sparse Transformers, proposition 1.
        dim: along which the result sums to 1.

    Raises:
        ValueError: ``alpha`` is a number not in (1, inf).
    """
    if isinstance(alpha, Tensor):
        shape = list(logits.shape)
        shape[dim] = 1
        alpha = upcast(alpha).expand(shape).movedim(dim, -1).reshape(-1, 1)
    else:
        check_alpha(alpha)
    return _by_rows(lambda logits_NV: _Entmax.apply(logits_NV, alpha), logits, dim)


def log_entmax(logits: Tensor, alpha: float = 1.5, dim: int = -1) -> Tensor:
    """Return the logarithm of :func:`entmax`: minus infinity outside of the support, with a gradient of zero.

    Raises:
        ValueError: ``alpha`` is not in (1, inf).
    """
    check_alpha(alpha)
    return _by_rows(lambda logits_NV: _LogEntmax.apply(logits_NV, alpha), logits, dim)


def entmax_jacobian_product(logits: Tensor, vector: Tensor, alpha: float | Tensor = 1.5, dim: int = -1) -> Tensor:
    """Return ``J v`` without forming J. J is symmetric: this is ``v J`` as well.

    ``J = diag(g) - g g^T / sum(g)`` with ``g = p^(2 - alpha)`` on the support, 0 elsewhere: Peters, Niculae & Martins
    2019, proposition 2. At the edge of a support, where p has a kink up to ``alpha = 2``, this is one of its slopes.

    Args:
        logits: scores of any shape.
        vector: v, in the shape of ``logits``.
        alpha: as in :func:`entmax`.
        dim: the dimension of the distribution.

    Raises:
        ValueError: as ``entmax``.
    """
    return _jacobian_product(entmax(logits, alpha, dim), upcast(vector), alpha, dim)


def sparsemax_loss(logits: Tensor, target: Tensor, dim: int = -1) -> Tensor:
    """Return :func:`entmax_loss` with ``alpha = 2``: Martins & Astudillo 2016, section 3."""
    return entmax_loss(logits, target, 2.0, dim)


def entmax_loss(logits: Tensor, target: Tensor, alpha: float = 1.5, dim: int = -1) -> Tensor:
    """Return the Fenchel-Young loss of entmax: ``max over p of (p . z + H(p)) - y . z - H(y)``.

    ``H(p) = sum_j (p_j - p_j^alpha) / (alpha (alpha - 1))`` is Tsallis' entropy. The maximum is at ``p = entmax(z)``,
    the loss is never negative, and 0 only where ``p = y``; its gradient is ``p - y``: Blondel, Martins & Niculae 2020,
    Learning with Fenchel-Young Losses, section 3 and table 1.

    Args:
        logits: z.
        target: the distribution y in the shape of ``logits``, or, as integers and without ``dim``, where it is 1. Gets
            no gradient.
        alpha: in (1, inf).
        dim: along which y sums to 1.

    Raises:
        ValueError: ``alpha`` is not in (1, inf).
    """
    check_alpha(alpha)
    logits = upcast(logits).movedim(dim, -1)
    if target.is_floating_point():
        y = target.to(logits.dtype).movedim(dim, -1)
    else:
        y = torch.zeros_like(logits).scatter_(-1, target.unsqueeze(-1).long(), 1.0)
    return _FenchelYoung.apply(logits, entmax(logits, alpha), y, alpha)


class Entries(NamedTuple):
    """Entries of N rows: all of them, ``[N, V]``, or a list ``[P]`` that has all of the supports."""

    scaled: Tensor
    """``s = a (z - max z)``, of each entry."""
    largest_N1: Tensor
    """``max z``."""
    place_P: Tensor | None = None
    """Where those listed stand, ``row * V + column``, rising; None for all."""
    size_N: Tensor | None = None
    """How many of each row are listed; None for all."""


def row_sums(values: Tensor, entries: Entries) -> Tensor:
    """Return the sum over each row's entries, ``[N, 1]``."""
    if entries.size_N is None:
        return values.sum(1, keepdim=True)
    return torch.segment_reduce(values, "sum", lengths=entries.size_N, unsafe=True)[:, None]


def at_entries(values_N1: Tensor, entries: Entries) -> Tensor:
    """Return each row's value at its entries, in a shape that broadcasts."""
    return values_N1 if entries.size_N is None else values_N1.squeeze(1).repeat_interleave(entries.size_N)


def solve(logit_NV: Tensor, alpha: float, listed_N1: Tensor | None = None) -> tuple[Entries, Tensor, Tensor]:
    """Return the entries that matter, their probabilities, and ``log theta`` of each row; not differentiable.

    Args:
        logit_NV: in the precision to compute in.
        alpha: in (1, inf).
        listed_N1: a column of each row that is to be among the entries in any case.
    """
    a = alpha - 1
    if torch.compiler.is_compiling():  # how many entries matter no compiler can trace
        return _all_entries(logit_NV, a), *_solve_op(logit_NV, alpha)
    entries, bound_N1 = _entries(logit_NV, a, listed_N1)
    return entries, *_probabilities(entries, a, bound_N1)


def fenchel_young(expected: Tensor, target: Tensor, log_theta: Tensor, alpha: float) -> Tensor:
    """Return the loss of rows whose target is a single entry, from ``expected = p . s`` and ``target = y . s``.

    It is ``p . s / alpha + ((1 - theta) / alpha - y . s) / a``: each term vanishes as p goes to y.
    """
    return (expected / alpha + (-torch.expm1(log_theta) / alpha - target) / (alpha - 1)).clamp_(min=0)


def full_support_logits(probability: Tensor, alpha: float) -> Tensor:
    """Return logits of which ``probability`` is the entmax, if none is 0: ``p^a / a``, where tau = 0."""
    a = alpha - 1
    return probability.pow(a) / a


def check_alpha(alpha: float) -> None:
    """Raise ``ValueError`` unless ``alpha`` is in (1, inf)."""
    if not (math.isfinite(alpha) and alpha > 1):
        raise ValueError(f"alpha={alpha}: must be in (1, inf); 1 itself is the softmax")


# -- how they are differentiated --------------------------------------------------------------------------------------


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logit_NV, alpha):
        logit_NV = upcast(logit_NV)
        if isinstance(alpha, Tensor):
            probability_NV, _ = _probabilities(_all_entries(logit_NV, alpha - 1), alpha - 1)
        else:
            entries, probability, _ = solve(logit_NV, alpha)
            probability_NV = _everywhere(entries, probability, logit_NV, 0.0)
            ctx.alpha, alpha = alpha, None
        ctx.save_for_backward(probability_NV, alpha)
        return probability_NV

    @staticmethod
    def backward(ctx, upstream_NV):
        probability_NV, alpha_N1 = ctx.saved_tensors
        if alpha_N1 is None:
            return _jacobian_product(probability_NV, upstream_NV, ctx.alpha, 1), None
        gradient_N1 = None
        if ctx.needs_input_grad[1]:
            gradient_N1 = (upstream_NV * _slope_in_alpha(probability_NV, alpha_N1)).sum(1, keepdim=True)
        return _jacobian_product(probability_NV, upstream_NV, alpha_N1, 1), gradient_N1


class _LogEntmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logit_NV, alpha):
        ctx.alpha, logit_NV = alpha, upcast(logit_NV)
        entries, probability, _ = solve(logit_NV, alpha)
        log_NV = _everywhere(entries, probability.log_(), logit_NV, -torch.inf)
        ctx.save_for_backward(log_NV)
        return log_NV

    @staticmethod
    def backward(ctx, upstream_NV):
        (log_NV,) = ctx.saved_tensors
        inside_NV = log_NV > -torch.inf
        log_NV = torch.where(inside_NV, log_NV, 0.0)
        g_NV = torch.where(inside_NV, ((2 - ctx.alpha) * log_NV).exp(), 0.0)
        pull_NV = torch.where(inside_NV, upstream_NV * ((1 - ctx.alpha) * log_NV).exp(), 0.0)
        return pull_NV - g_NV * (pull_NV.sum(1, keepdim=True) / g_NV.sum(1, keepdim=True)), None


class _FenchelYoung(torch.autograd.Function):
    """The gradient does not go through ``p``, which is the maximiser; the gradient's own gradient does."""

    @staticmethod
    def forward(ctx, z, p, y, alpha):
        ctx.save_for_backward(p, y)
        a = alpha - 1
        scaled = (z - z.amax(-1, keepdim=True)).mul_(a)
        log_theta = a * p.amax(-1).log()
        entropy = (y - y.pow(alpha)).sum(-1) / (alpha * a)
        return (fenchel_young(_dot(p, scaled), _dot(y, scaled), log_theta, alpha) - entropy).clamp_(min=0)

    @staticmethod
    def backward(ctx, upstream):
        p, y = ctx.saved_tensors
        return upstream.unsqueeze(-1) * (p - y), None, None, None


def _jacobian_product(probability: Tensor, vector: Tensor, alpha: float | Tensor, dim: int) -> Tensor:
    g = _powers(probability, 2 - alpha)
    product = g * vector
    return product - g * (product.sum(dim, keepdim=True) / g.sum(dim, keepdim=True))


def _slope_in_alpha(p_NV: Tensor, alpha_N1: Tensor) -> Tensor:
    """Return the derivative of every probability by its row's alpha."""
    a = alpha_N1 - 1
    g_NV = _powers(p_NV, 2 - alpha_N1)
    share_NV = g_NV / g_NV.sum(1, keepdim=True)
    surprise_NV = -p_NV * torch.where(p_NV > 0, p_NV, 1.0).log()
    entropy_N1 = surprise_NV.sum(1, keepdim=True)
    return (p_NV - share_NV) / a**2 + (surprise_NV - share_NV * entropy_N1) / a


def _powers(probability: Tensor, exponent: float | Tensor) -> Tensor:
    """Return ``p^exponent`` on the support, 0 elsewhere, also where the exponent is 0 or negative."""
    inside = probability > 0
    return torch.where(inside, torch.where(inside, probability, 1.0).pow(exponent), 0.0)


def _dot(weight: Tensor, value: Tensor) -> Tensor:
    """Return the products' sum along the last dimension, a weight of 0 silencing even infinity."""
    return (weight * torch.where(weight > 0, value, 0.0)).sum(-1)


def _by_rows(function: Callable[[Tensor], Tensor], logits: Tensor, dim: int) -> Tensor:
    """Apply a function of rows ``[N, V]`` along ``dim``."""
    moved = logits.movedim(dim, -1)
    return function(moved.reshape(-1, moved.shape[-1])).view(moved.shape).movedim(-1, dim)


# -- the threshold ----------------------------------------------------------------------------------------------------


def _everywhere(entries: Entries, values: Tensor, logit_NV: Tensor, elsewhere: float) -> Tensor:
    """Put values of the entries where they stand among all entries."""
    if entries.place_P is None:
        return values
    flat = values.new_full((logit_NV.numel(),), elsewhere)
    return flat.scatter_(0, entries.place_P, values).view(logit_NV.shape)


def _solve_all(logit_NV: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    entries, probability, log_theta_N1 = solve(logit_NV, alpha)
    return _everywhere(entries, probability, logit_NV, 0.0), log_theta_N1


_solve_op = torch.library.custom_op("lvsoftmax::entmax", _solve_all, mutates_args=())
_solve_op.register_fake(lambda logit_NV, alpha: (torch.empty_like(logit_NV), logit_NV[:, :1].clone()))


def _entries(logit_NV: Tensor, a: float, listed_N1: Tensor | None) -> tuple[Entries, Tensor | None]:
    """Return entries that include the supports, and a bound from above on ``log theta`` where they are a list."""
    rows, vocab = logit_NV.shape
    logit_NV = logit_NV.contiguous()
    groups = vocab // GROUP
    if rows == 0 or groups < GROUP:
        return _all_entries(logit_NV, a), None
    # A group has an entry of each stretch of the row: words of like frequency stand together, and in many a support.
    maximum_NG = logit_NV[:, : groups * GROUP].unflatten(1, (GROUP, groups)).amax(1)
    maximum_NG = torch.cat([maximum_NG, logit_NV[:, groups * GROUP :]], 1)
    some = _all_entries(maximum_NG, a)
    bound_N1 = _log_theta(some, a, None)[1]
    listed_NV = logit_NV >= some.largest_N1 - SLACK / a * bound_N1.exp()
    if listed_N1 is not None:
        listed_NV.scatter_(1, listed_N1, True)
    place_P = listed_NV.view(-1).nonzero().squeeze(1)
    if len(place_P) > FEW * rows * vocab:
        return _all_entries(logit_NV, a), bound_N1
    size_N = (place_P // vocab).bincount(minlength=rows)
    entries = Entries(logit_NV.view(-1).index_select(0, place_P), some.largest_N1, place_P, size_N)
    entries.scaled.sub_(at_entries(some.largest_N1, entries)).mul_(a)
    return entries, bound_N1


def _all_entries(logit_NV: Tensor, a: float | Tensor) -> Entries:
    largest_N1 = logit_NV.amax(1, keepdim=True)
    return Entries((logit_NV - largest_N1).mul_(a), largest_N1)


def _probabilities(entries: Entries, a: float | Tensor, bound_N1: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the probabilities of the entries, and ``log theta``."""
    low_N1, high_N1 = _log_theta(entries, a, bound_N1)
    if low_N1 is high_N1:
        return _powers_above(entries, low_N1, a), low_N1
    # An entry at the edge of the support leaps from 0 to about eps^(1/a) between two neighbouring numbers theta: what
    # makes the sum 1 lies between them.
    low, high = _powers_above(entries, low_N1, a), _powers_above(entries, high_N1, a)
    below_N1, above_N1 = row_sums(low, entries), row_sums(high, entries)
    share_N1 = (1 - below_N1) / (above_N1 - below_N1).clamp_(min=torch.finfo(low.dtype).tiny)
    return low.lerp_(high, at_entries(share_N1.clamp_(0, 1), entries)), high_N1


def _powers_above(entries: Entries, log_theta_N1: Tensor, a: float | Tensor) -> Tensor:
    """Return ``[theta + s]_+^(1/a)``."""
    if isinstance(a, float) and a in (0.5, 1):
        above = (entries.scaled + at_entries(log_theta_N1.exp(), entries)).clamp_(min=0)
        return above if a == 1 else above.square_()
    one = _beyond_one(entries, log_theta_N1)
    return one.log1p_().add_(at_entries(log_theta_N1, entries)).div_(a).exp_()


def _beyond_one(entries: Entries, log_theta_N1: Tensor) -> Tensor:
    """Return ``[theta + s]_+ / theta - 1``: of this, the log1p of an alpha close to 1 has correct digits."""
    tiny = torch.finfo(log_theta_N1.dtype).tiny  # the largest entry's 0 / theta is a number
    return (entries.scaled / at_entries(log_theta_N1.exp().clamp_(min=tiny), entries)).clamp_(min=-1)


def _log_theta(entries: Entries, a: float | Tensor, bound_N1: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return bounds of the ``log theta`` at which the probabilities sum to 1, as close to it as rounding allows."""
    start_N1 = torch.zeros_like(entries.largest_N1) if bound_N1 is None else bound_N1
    if not (bool((a <= 1).all()) if isinstance(a, Tensor) else a <= 1):
        return _bisection(entries, a, start_N1)
    root_N1 = _newton(entries, a, start_N1)
    return root_N1, root_N1


def _newton(entries: Entries, a: float | Tensor, log_theta_N1: Tensor) -> Tensor:
    """Newton's method for ``a <= 1`` on ``norm(theta) = (sum_j [theta + s_j]_+^(1/a))^a = 1``.

    The norm is convex, and linear in theta where all of the support is alike. From above, the steps come down to the
    root and never pass it; fewer than ten of them do.
    """
    enough = 0.1 * math.sqrt(torch.finfo(log_theta_N1.dtype).eps)  # the next error is about this one's square
    for _ in range(64):
        one = _beyond_one(entries, log_theta_N1)
        if isinstance(a, float) and a == 1:
            slope = (one > -1).to(one.dtype)
        elif isinstance(a, float) and a == 0.5:
            slope = one + 1
        else:
            slope = torch.where(one > -1, one.log1p().mul_(1 / a - 1).exp_(), 0.0)
        slope_N1 = row_sums(slope, entries)
        sum_N1 = slope_N1 + row_sums(slope.mul_(one), entries)  # both in units of theta's powers
        log_norm_N1 = log_theta_N1 + a * sum_N1.log()
        log_theta_N1 = log_theta_N1 + torch.log1p(torch.expm1(-log_norm_N1) * (sum_N1 / slope_N1))
        if not (log_norm_N1 > enough * a).any():
            break
    return log_theta_N1


def _bisection(entries: Entries, a: float | Tensor, high_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Halve the interval of ``log theta``, which begins at that of a uniform distribution."""
    length = entries.scaled.shape[-1]
    low_N1 = torch.zeros_like(high_N1) - a * math.log(max(length, 2))
    for _ in range(40 if low_N1.dtype == torch.float32 else 70):
        middle_N1 = (low_N1 + high_N1) / 2
        over_N1 = row_sums(_powers_above(entries, middle_N1, a), entries) > 1
        low_N1, high_N1 = torch.where(over_N1, low_N1, middle_N1), torch.where(over_N1, middle_N1, high_N1)
    return low_N1, high_N1
