"""The softmax in safe form: any ``dim``, any shape, float32, float64 or bfloat16 in, results in float32 at least.

Everything here but ``cross_entropy`` takes a ``temperature`` T, or in its place a ``base`` ``b = exp(1 / T)``:

    softmax(z)_i = exp(z_i / T) / sum_j exp(z_j / T) = b^z_i / sum_j b^z_j

T may be a number, with its limits, or a tensor that broadcasts against the logits, to be learned; a tensor must be
finite and not zero, which is not looked at. The limits of softmax are piecewise constant and carry no gradient.

| T | b | softmax |
| --- | --- | --- |
| 0 | inf | argmax: 1 at the largest logit, shared equally where several are the largest |
| 1 | e | the usual one |
| inf, -inf | 1 | uniform over the logits that are not ``-inf`` |
| negative | below 1 | softargmin, ``softmax(-z)`` at temperature ``-T`` |
| -0.0 | 0 | argmin |

Reference: Bridle 1990, Probabilistic Interpretation of Feedforward Classification Network Outputs.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lvsoftmax.ops.numerics import upcast


def softmax(logits: Tensor, dim: int = -1, *, temperature: float | Tensor = 1.0, base: float | None = None) -> Tensor:
    """Return ``exp(logits / T) / sum(exp(logits / T))``.

    Raises:
        ValueError: ``temperature`` is not a number; ``base`` is negative or not a number, or both are given.
    """
    return torch.softmax(_scaled(upcast(logits), dim, _temperature(temperature, base)), dim)


def log_softmax(
    logits: Tensor, dim: int = -1, *, temperature: float | Tensor = 1.0, base: float | None = None
) -> Tensor:
    """Return ``log(softmax(logits))``: ``(logits - logsumexp(logits)) / T``.

    Raises:
        ValueError: as ``softmax``.
    """
    return torch.log_softmax(_scaled(upcast(logits), dim, _temperature(temperature, base)), dim)


def logsumexp(logits: Tensor, dim: int = -1, *, temperature: float | Tensor = 1.0, base: float | None = None) -> Tensor:
    """Return ``T log(sum(exp(logits / T)))``, whose gradient is ``softmax``.

    A smooth maximum: between ``max`` and ``max + T log n``; at temperature 0 the maximum, at -0.0 the minimum.

    Raises:
        ValueError: as ``softmax``, or the temperature is infinite, where the value is, too.
    """
    logits, temperature = upcast(logits), _temperature(temperature, base)
    if not isinstance(temperature, Tensor):
        if temperature == 1:
            return torch.logsumexp(logits, dim)
        if math.isinf(temperature):
            raise ValueError(f"temperature={temperature}: the log-sum-exp is infinite there; softmax has a limit")
        if temperature == 0:
            return logits.amax(dim) if _largest_first(temperature) else logits.amin(dim)
    scaled = _scaled(logits, dim, temperature)
    return (_best(logits, dim, temperature) + temperature * torch.logsumexp(scaled, dim, keepdim=True)).squeeze(dim)


def cross_entropy(logits: Tensor, target: Tensor, dim: int = -1) -> Tensor:
    """Return ``-log softmax(logits)[target]``, in nats; its gradient is ``p - y``, with y one-hot at the target.

    Computed as ``log(1 + exp(o - z_t))`` with ``o`` the log-sum-exp of the *other* logits, so that value and gradient
    keep their digits as p goes to 1: ``1 - p`` is never formed as a difference.

    Args:
        logits: scores of any shape.
        target: the right indices along ``dim``; the shape of ``logits`` without ``dim``.
        dim: the dimension of the distribution.
    """
    logits, index = upcast(logits), target.unsqueeze(dim)
    others = torch.logsumexp(logits.scatter(dim, index, -torch.inf), dim)
    return -F.logsigmoid(logits.gather(dim, index).squeeze(dim) - others)


def softmax_jacobian(
    logits: Tensor, dim: int = -1, *, temperature: float | Tensor = 1.0, base: float | None = None
) -> Tensor:
    """Return ``J_ij = dp_i / dz_j = p_i (delta_ij - p_j) / T``, symmetric; i and j are the last two dimensions.

    The other dimensions of ``logits`` come before them, in their order. The diagonal is taken from rows adding up to
    zero, so that it keeps its digits as p goes to 1.

    Raises:
        ValueError: as ``softmax``, or the temperature is 0, where there is no derivative.
    """
    temperature = _slope_temperature(temperature, base)
    p = softmax(logits, dim, temperature=temperature).movedim(dim, -1)
    off_diagonal = (p.unsqueeze(-1) * -p.unsqueeze(-2)).diagonal_scatter(torch.zeros_like(p), 0, -2, -1)
    return (off_diagonal - torch.diag_embed(off_diagonal.sum(-1))) / temperature


def softmax_jacobian_product(
    logits: Tensor, vector: Tensor, dim: int = -1, *, temperature: float | Tensor = 1.0, base: float | None = None
) -> Tensor:
    """Return ``J v = p (v - <p, v>) / T`` without forming J. J is symmetric: this is ``v J`` as well.

    Args:
        logits: scores of any shape.
        vector: v, in the shape of ``logits``.
        dim: the dimension of the distribution.
        temperature: T.
        base: b, in the place of T.

    Raises:
        ValueError: as ``softmax_jacobian``.
    """
    temperature = _slope_temperature(temperature, base)
    p = softmax(logits, dim, temperature=temperature)
    return p * (vector - (p * vector).sum(dim, keepdim=True)) / temperature


def _temperature(temperature: float | Tensor, base: float | None) -> float | Tensor:
    """Return T, from whichever of the two is given."""
    if base is not None:
        if isinstance(temperature, Tensor) or temperature != 1.0:
            raise ValueError(f"temperature={temperature} and base={base} say the same thing; give one of them")
        if not base >= 0:
            raise ValueError(f"base={base}: must not be negative")
        exponent = math.log(base) if base > 0 else -math.inf
        return 1 / exponent if exponent else math.inf
    if not isinstance(temperature, Tensor) and math.isnan(temperature):
        raise ValueError("temperature=nan: must be a number")
    return temperature


def _slope_temperature(temperature: float | Tensor, base: float | None) -> float | Tensor:
    temperature = _temperature(temperature, base)
    if not isinstance(temperature, Tensor) and temperature == 0:
        raise ValueError(f"temperature={temperature}: argmax has no Jacobian; choose a temperature other than zero")
    return temperature


def _scaled(logits: Tensor, dim: int, temperature: float | Tensor) -> Tensor:
    """Return what has the softmax asked for as its usual one."""
    if not isinstance(temperature, Tensor):
        if temperature == 1:
            return logits
        if math.isinf(temperature):
            return torch.where(logits.isinf(), logits, 0.0)
        if temperature == 0:
            is_best = logits == _best(logits, dim, temperature)
            return torch.where(is_best, logits.new_zeros(()), -torch.inf)
    # Shifted before it is divided: a quotient by a small temperature could overflow, the one of the best logit is zero.
    return (logits - _best(logits, dim, temperature)) / temperature


def _best(logits: Tensor, dim: int, temperature: float | Tensor) -> Tensor:
    """Return the logit that gets the most, as a constant: results do not depend on it."""
    logits = logits.detach()
    return logits.amax(dim, keepdim=True) if _largest_first(temperature) else logits.amin(dim, keepdim=True)


def _largest_first(temperature: float | Tensor) -> bool:
    return isinstance(temperature, Tensor) or math.copysign(1.0, temperature) > 0
