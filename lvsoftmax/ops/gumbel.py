"""Sampling by Gumbel noise g: the largest ``log_weight + g`` is a draw, the k largest are k draws, a softmax trains.

A standard Gumbel variable is ``-log(e)`` with ``e`` standard exponential. Every function takes a ``generator`` of its
own; None is PyTorch's global one. Results are in float32 at least.
"""

import math

import torch
from torch import Tensor

from lvsoftmax.ops.numerics import upcast
from lvsoftmax.ops.softmax import softmax


def gumbel_perturbed(log_weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return ``log_weight + g`` with independent standard Gumbel ``g``; ``-inf`` (no weight) stays.

    The exponential variable behind ``g`` is never zero for the generators used here, so ``g`` is finite.
    """
    log_weight = upcast(log_weight)
    noise = torch.empty_like(log_weight).exponential_(generator=generator).log_()
    return log_weight - noise


def gumbel_argmax(log_weight: Tensor, generator: torch.Generator | None = None, dim: int = -1) -> Tensor:
    """Draw one index along ``dim`` with probability proportional to ``exp(log_weight)``: the Gumbel-max trick.

    Reference: Gumbel 1954; Maddison, Tarlow & Minka 2014, A* Sampling, section 2.
    """
    return gumbel_perturbed(log_weight, generator).argmax(dim)


def gumbel_topk(log_weight: Tensor, k: int, generator: torch.Generator | None = None, dim: int = -1) -> Tensor:
    """Draw ``k`` different indices along ``dim``, in order: each from ``exp(log_weight)`` among those not yet drawn.

    An ordered draw ``i_1, ..., i_k`` has probability ``prod_j p_{i_j} / (1 - p_{i_1} - ... - p_{i_(j-1)})``, p being
    ``softmax(log_weight)`` (Plackett-Luce). Indices without weight come after all others.

    Reference: Kool, van Hoof & Welling 2019, Stochastic Beams and Where to Find Them, section 2.3.

    Raises:
        ValueError: ``k`` is negative or more than there are indices.
    """
    if not 0 <= k <= log_weight.shape[dim]:
        raise ValueError(f"k={k}: must be between 0 and the {log_weight.shape[dim]} that there are to draw from")
    return gumbel_perturbed(log_weight, generator).topk(k, dim).indices


def gumbel_softmax(
    logits: Tensor,
    temperature: float = 1.0,
    *,
    hard: bool = False,
    dim: int = -1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a differentiable sample ``softmax((logits + g) / T)``, near to one-hot at a low temperature.

    Reference: Jang, Gu & Poole 2017, Categorical Reparameterization with Gumbel-Softmax, equation 2 and section 2.2;
    Maddison, Mnih & Teh 2017, The Concrete Distribution.

    Args:
        logits: log-weights of any shape.
        temperature: T > 0.
        hard: straight-through: the value is exactly one-hot, at the largest entry of the soft sample, a draw from
            ``softmax(logits)``; the gradient is that of the soft sample.
        dim: the dimension of the distribution.
        generator: where the noise comes from.

    Raises:
        ValueError: ``temperature`` is not a positive finite number.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature}: must be a positive finite number; gumbel_argmax draws at zero")
    soft = softmax(gumbel_perturbed(logits, generator), dim, temperature=temperature)
    if not hard:
        return soft
    one_hot = torch.zeros_like(soft).scatter(dim, soft.argmax(dim, keepdim=True), 1.0)
    return soft + (one_hot - soft).detach()  # rounds to one_hot: (1 - y) + y is exactly 1 for y in [0, 1]
