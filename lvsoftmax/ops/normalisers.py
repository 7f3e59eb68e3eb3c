"""Scores to probabilities by other weights than the exponential, and by the sum alone.

All but the last divide a positive weight by the sum of the weights,

    p_i = f(x_i) / sum_j f(x_j)

so that with ``g = log f`` everything is the softmax of ``g(x)``: ``log p = g(x) - logsumexp(g(x))``, the gradient of
``-log p_t`` is ``g'(x_i) (p_i - [i = t])``, and the Jacobian is ``dp_i / dx_j = p_i (delta_ij - p_j) g'(x_j)``, which
unlike the softmax's is not symmetric.

| normaliser | f(x) | invariant to |
| --- | --- | --- |
| ``Exponential`` | exp(x) | adding a number to all scores |
| ``Spherical`` | x^2 + epsilon | the sign of a score; nearly, where epsilon is small, to multiplying all scores |
| ``Taylor`` | 1 + x + x^2 / 2 | |
| ``Sigmoidal`` | exp(x) sigmoid(x) | |
| ``divide_by_sum`` | x, not negative | multiplying all scores |

Any ``dim``, any shape; float32, float64 or bfloat16 in, results in float32 at least, without overflow at any score.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from lvsoftmax.ops.numerics import upcast
from lvsoftmax.ops.softmax import log_softmax, softmax


@runtime_checkable
class Normaliser(Protocol):
    """A positive weight f(x) per score x; probabilities are weights over their sum."""

    def log_weight(self, score: Tensor) -> Tensor:
        """Return ``g(x) = log f(x)``."""
        ...

    def slope(self, score: Tensor) -> Tensor:
        """Return ``g'(x)``."""
        ...

    def weigh(self, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``f(x) / s``, ``f'(x) / s`` and ``log s``; s is a number per row that keeps the weights from overflow.

        The rows of ``score`` are distributions; it is in the precision of sums and may be overwritten. For those who
        take gradients themselves.
        """
        ...

    def scores(self, log_prob: Tensor) -> Tensor:
        """Return scores that have these log-probabilities (the last dimension is the distribution).

        There are many; each normaliser says which ones it takes, with a view to learning from there.
        """
        ...


@dataclass(frozen=True)
class Exponential:
    """``f(x) = exp(x)``: the softmax."""

    def log_weight(self, score: Tensor) -> Tensor:
        """Return ``x``."""
        return upcast(score)

    def slope(self, score: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(upcast(score))

    def weigh(self, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the exponentials twice, the largest being 1."""
        largest = score.amax(-1, keepdim=True)
        weight = score.sub_(largest).exp_()
        return weight, weight, largest

    def scores(self, log_prob: Tensor) -> Tensor:
        """Return ``log_prob``: the scores whose weights need no division."""
        return log_prob


@dataclass(frozen=True)
class Spherical:
    """``f(x) = x^2 + epsilon``: the spherical softmax.

    Computed as ``log f = 2 log hypot(x, sqrt(epsilon))``, where no square overflows.

    Reference: de Brebisson & Vincent 2016, An Exploration of Softmax Alternatives Belonging to the Spherical Loss
    Family; Vincent, de Brebisson & Bouthillier 2015.

    Args:
        epsilon: above zero. ``g'`` is at most ``1 / sqrt(epsilon)``.

    Raises:
        ValueError: ``epsilon`` is not a positive finite number.
    """

    epsilon: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ValueError(f"epsilon={self.epsilon}: must be a positive finite number")

    def log_weight(self, score: Tensor) -> Tensor:
        """Return ``log(x^2 + epsilon)``."""
        return 2 * self._root(score).log()

    def slope(self, score: Tensor) -> Tensor:
        """Return ``2 x / (x^2 + epsilon)``."""
        root = self._root(score)
        return 2 * (upcast(score) / root) / root

    def weigh(self, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return sums of squares and products, without a logarithm; the largest weight is 1."""
        root = self._root(torch.maximum(score.amax(-1, keepdim=True), -score.amin(-1, keepdim=True)))
        weight = score.div_(root).square().add_(self.epsilon / root.square())
        return weight, score.mul_(2 / root), 2 * root.log()

    def scores(self, log_prob: Tensor) -> Tensor:
        """Return positive scores of which the smallest is ``sqrt(epsilon)``, where ``g'`` is largest.

        From there a rare word grows fastest. Below it lies the minimum of f at zero, which no gradient leaves.
        """
        ratio = torch.exp(log_prob - log_prob.amin(-1, keepdim=True))
        return torch.sqrt(self.epsilon * (2 * ratio - 1))

    def _root(self, score: Tensor) -> Tensor:
        score = upcast(score)
        return torch.hypot(score, score.new_tensor(math.sqrt(self.epsilon)))


@dataclass(frozen=True)
class Taylor:
    """``f(x) = 1 + x + x^2 / 2``, the Taylor polynomial of the exponential: the Taylor softmax.

    ``f(x) = ((x + 1)^2 + 1) / 2``: the spherical softmax of ``x + 1`` at ``epsilon = 1``, and computed as that.

    Reference: de Brebisson & Vincent 2016, as ``Spherical``.
    """

    def log_weight(self, score: Tensor) -> Tensor:
        """Return ``log(1 + x + x^2 / 2)``."""
        return _UNIT.log_weight(upcast(score) + 1) - math.log(2)

    def slope(self, score: Tensor) -> Tensor:
        """Return ``(1 + x) / (1 + x + x^2 / 2)``."""
        return _UNIT.slope(upcast(score) + 1)

    def weigh(self, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the spherical softmax does."""
        weight, derivative, log_scale = _UNIT.weigh(score.add_(1))
        return weight, derivative, log_scale - math.log(2)

    def scores(self, log_prob: Tensor) -> Tensor:
        """Return scores of which the smallest is 0, where ``g'`` is largest."""
        return _UNIT.scores(log_prob) - 1


@dataclass(frozen=True)
class Sigmoidal:
    """``f(x) = exp(x) sigmoid(x)``: the sigsoftmax.

    Like ``exp(x)`` far above zero, like ``exp(2 x)`` far below.

    Reference: Kanai, Fujiwara, Yamanaka & Adachi 2018, Sigsoftmax: Reanalysis of the Softmax Bottleneck.
    """

    def log_weight(self, score: Tensor) -> Tensor:
        """Return ``x + log(sigmoid(x))``."""
        score = upcast(score)
        return score + F.logsigmoid(score)

    def slope(self, score: Tensor) -> Tensor:
        """Return ``2 - sigmoid(x)``."""
        return 2 - torch.sigmoid(upcast(score))

    def weigh(self, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights from one exponential each, ``e = exp(x - m)`` with m the largest score.

        ``sigmoid(x) = b q`` with ``q = e / (b e + c)``, where b and c are ``exp(m)`` and 1 over the larger of the two;
        so ``f(x) = e q exp(m) b``.
        """
        largest = score.amax(-1, keepdim=True)
        b, c = largest.clamp(max=0).exp(), largest.clamp(min=0).neg().exp()
        exponential = score.sub_(largest).exp_()
        q = (exponential * b).add_(c.clamp(min=torch.finfo(c.dtype).tiny))  # 0 / 0 where both have underflowed
        torch.div(exponential, q, out=q)
        weight = exponential.mul_(q)
        return weight, q.mul_(-b).add_(2).mul_(weight), largest + largest.clamp(max=0)

    def scores(self, log_prob: Tensor) -> Tensor:
        """Return scores that are 0 for a probability of 1 / n: they lie about the bend of f.

        With ``w = f(x)`` given, ``exp(2 x) = w (1 + exp(x))`` is a quadratic equation for ``exp(x)``, and
        ``x = log(w) / 2 + asinh(sqrt(w) / 2)``.
        """
        half = (log_prob + math.log(log_prob.shape[-1] / 2)) / 2
        return half + torch.asinh(half.exp() / 2)


_UNIT = Spherical(1.0)


def normalise(score: Tensor, normaliser: Normaliser, dim: int = -1) -> Tensor:
    """Return ``p = f(x) / sum(f(x))``."""
    return softmax(normaliser.log_weight(score), dim)


def log_normalise(score: Tensor, normaliser: Normaliser, dim: int = -1) -> Tensor:
    """Return ``log p = g(x) - logsumexp(g(x))``."""
    return log_softmax(normaliser.log_weight(score), dim)


def jacobian(score: Tensor, normaliser: Normaliser, dim: int = -1) -> Tensor:
    """Return ``J_ij = dp_i / dx_j = p_i (delta_ij - p_j) g'(x_j)``; i and j are the last two dimensions."""
    p, slope = (x.movedim(dim, -1) for x in (normalise(score, normaliser, dim), normaliser.slope(score)))
    return (torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)) * slope.unsqueeze(-2)


def jvp(score: Tensor, vector: Tensor, normaliser: Normaliser, dim: int = -1) -> Tensor:
    """Return ``J v`` without forming J: how p moves when the scores move along v."""
    p, moved = normalise(score, normaliser, dim), normaliser.slope(score) * vector
    return p * (moved - (p * moved).sum(dim, keepdim=True))


def vjp(score: Tensor, vector: Tensor, normaliser: Normaliser, dim: int = -1) -> Tensor:
    """Return ``v J`` without forming J: the gradient of ``<v, p>``."""
    p = normalise(score, normaliser, dim)
    return normaliser.slope(score) * p * (vector - (p * vector).sum(dim, keepdim=True))


def divide_by_sum(score: Tensor, dim: int = -1) -> Tensor:
    """Return ``p = x / sum(x)``.

    Raises:
        ValueError: a score is negative, infinite or not a number, or all scores along ``dim`` are zero. This looks at
            the values, which on a GPU waits for them.
    """
    share, total = _shares(score, dim)
    return share / total


def log_divide_by_sum(score: Tensor, dim: int = -1) -> Tensor:
    """Return ``log p = log x - log sum(x)``, ``-inf`` where a score is zero.

    Raises:
        ValueError: as ``divide_by_sum``.
    """
    share, total = _shares(score, dim)
    return share.log() - total.log()


def divide_by_sum_jacobian(score: Tensor, dim: int = -1) -> Tensor:
    """Return ``J_ij = dp_i / dx_j = (delta_ij - p_i) / sum(x)``; i and j are the last two dimensions.

    Raises:
        ValueError: as ``divide_by_sum``.
    """
    p = divide_by_sum(score, dim).movedim(dim, -1)
    total = upcast(score).movedim(dim, -1).sum(-1)[..., None, None]
    return (torch.eye(p.shape[-1], dtype=p.dtype, device=p.device) - p.unsqueeze(-1)) / total


def divide_by_sum_jvp(score: Tensor, vector: Tensor, dim: int = -1) -> Tensor:
    """Return ``J v = (v - p sum(v)) / sum(x)`` without forming J.

    Raises:
        ValueError: as ``divide_by_sum``.
    """
    p = divide_by_sum(score, dim)
    return (vector - p * vector.sum(dim, keepdim=True)) / upcast(score).sum(dim, keepdim=True)


def divide_by_sum_vjp(score: Tensor, vector: Tensor, dim: int = -1) -> Tensor:
    """Return ``v J = (v - <p, v>) / sum(x)`` without forming J.

    Raises:
        ValueError: as ``divide_by_sum``.
    """
    p = divide_by_sum(score, dim)
    return (vector - (p * vector).sum(dim, keepdim=True)) / upcast(score).sum(dim, keepdim=True)


def _shares(score: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the scores over the largest one, whose sum cannot overflow, and that sum."""
    score = upcast(score)
    bad = score[(score < 0) | ~score.isfinite()]
    if len(bad):
        raise ValueError(f"a score is {bad[0].item():g}: scores must be finite and not negative; softmax takes any")
    largest = score.detach().amax(dim, keepdim=True)
    if (largest == 0).any():
        raise ValueError("all scores of a distribution are zero, so there is no sum to divide by")
    share = score / largest
    return share, share.sum(dim, keepdim=True)
