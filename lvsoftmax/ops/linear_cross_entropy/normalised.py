"""Cross-entropy of scores that other normalisers than the exponential turn into probabilities, by blocks of tokens.

Letters: N tokens, D hidden, V words, C tokens of one block. With a weight ``f`` per score, ``g = log f`` and the sum
over the *other* words ``o = sum over v != t of f(s_v)``,

    nll = log(1 + exp(log o - g(s_t)))
    dnll / ds_t = -g'(s_t) o / (o + f(s_t)),      dnll / ds_v = f'(s_v) / (o + f(s_t))  for v != t

which for ``f = exp`` are (3) and (4) of README.md, and keep their digits for the same reason. f and f' are scaled by a
number per row against overflow; only the target's weight, one per token, needs a logarithm. In the ``eager`` backend
two arrays ``[C, V]`` are alive at a time, f and f', so blocks are half as large; the ``cpp`` backend is the kernel of
the softmax, with other weights.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lvsoftmax.ops.backends import Backends
from lvsoftmax.ops.gradients_in_forward import GradientsInForward, is_differentiated
from lvsoftmax.ops.inputs import check_operands
from lvsoftmax.ops.linear_cross_entropy import native
from lvsoftmax.ops.linear_cross_entropy.autograd import per_token, weighted_sum
from lvsoftmax.ops.linear_cross_entropy.reference import accumulate, blocks, cast, room, zeros
from lvsoftmax.ops.normalisers import Exponential, Normaliser, Sigmoidal, Spherical, Taylor
from lvsoftmax.ops.numerics import product_dtype, sum_dtype, upcast
from lvsoftmax.ops.once_differentiable import once_differentiable

NORMALISED_BACKENDS = Backends(cpp=native.LIBRARY.obstacle)


def normalised_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    normaliser: Normaliser,
    *,
    backend: str = "auto",
) -> Tensor:
    """Return ``-log p[target]`` of each token, p from ``hidden @ weight.T + bias``, for any upstream gradient.

    The backward pass computes the scores again: four matrix products in all.

    Args:
        hidden_ND: hidden vectors.
        weight_VD: the table.
        bias_V: one number per word, or None.
        target_N: words.
        normaliser: the weight of a score; ``cpp`` knows those of ``ops/normalisers.py``, ``eager`` any.
        backend: a name in ``NORMALISED_BACKENDS`` or ``auto``.

    Raises:
        ValueError: operands that do not fit together; a backend that cannot run there, or does not know the normaliser.
    """
    check_operands(hidden_ND, weight_VD, bias_V, target_N)
    if _choose(backend, hidden_ND, normaliser) == "eager":
        return _PerToken.apply(hidden_ND, weight_VD, bias_V, target_N, normaliser)
    kernel, parameter, shift = _weights(normaliser)
    nll_N, _ = per_token(hidden_ND, weight_VD, _shifted(bias_V, weight_VD, shift), target_N, parameter, kernel)
    return nll_N


def normalised_cross_entropy_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    token_weight_N: Tensor,
    normaliser: Normaliser,
    *,
    backend: str = "auto",
) -> Tensor:
    """Return ``sum(token_weight * nll)`` as a scalar, to be differentiated at most once.

    Gradients are computed during the forward pass: three matrix products in all. Arguments and errors as of
    ``normalised_cross_entropy``.
    """
    check_operands(hidden_ND, weight_VD, bias_V, target_N, token_weight_N)
    token_weight_N = token_weight_N.to(sum_dtype(hidden_ND))
    if _choose(backend, hidden_ND, normaliser) == "eager":
        if not is_differentiated(hidden_ND, weight_VD, bias_V):
            return (token_weight_N * _PerToken.apply(hidden_ND, weight_VD, bias_V, target_N, normaliser)).sum()
        return _WeightedSum.apply(hidden_ND, weight_VD, bias_V, token_weight_N, target_N, normaliser)
    kernel, parameter, shift = _weights(normaliser)
    bias_V = _shifted(bias_V, weight_VD, shift)
    return weighted_sum(hidden_ND, weight_VD, bias_V, target_N, token_weight_N, parameter, 0.0, kernel)


def _choose(backend: str, hidden_ND: Tensor, normaliser: Normaliser) -> str:
    known = isinstance(normaliser, Exponential | Spherical | Taylor | Sigmoidal)
    if backend == "auto" and not known:
        return "eager"
    chosen = NORMALISED_BACKENDS.choose(backend, hidden_ND.device.type)
    if chosen != "eager" and not known:
        raise ValueError(f"backend={backend!r} does not know {normaliser}; choose eager")
    return chosen


def _weights(normaliser: Normaliser) -> tuple[str, float, float]:
    """Return the kernel in C++, the parameter of its weights, and what is to be added to the scores."""
    match normaliser:
        case Spherical(epsilon):
            return "spherical", math.sqrt(epsilon), 0.0
        case Taylor():  # ((x + 1)^2 + 1) / 2, and the half is nothing to a share
            return "spherical", 1.0, 1.0
        case Sigmoidal():
            return "sigmoidal", 0.0, 0.0
    return "cpp", 0.0, 0.0


def _shifted(bias_V: Tensor | None, weight_VD: Tensor, shift: float) -> Tensor | None:
    """Return the bias with a number added to it, in the precision of sums."""
    if not shift:
        return bias_V
    return upcast(weight_VD[:, 0]).new_full((len(weight_VD),), shift) if bias_V is None else upcast(bias_V) + shift


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, target_N, normaliser):
        ctx.dtype, ctx.normaliser = product_dtype(hidden_ND), normaliser
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N)
        return _step(ctx.dtype, normaliser, (hidden_ND, weight_VD, bias_V), target_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_N):
        *parameters, target_N = ctx.saved_tensors
        gradients = room(ctx.needs_input_grad[:3], *parameters)
        _step(ctx.dtype, ctx.normaliser, parameters, target_N, upstream_N, gradients)
        return *cast(gradients, *parameters), None, None


class _WeightedSum(GradientsInForward):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, token_weight_N, target_N, normaliser):
        parameters = (hidden_ND, weight_VD, bias_V)
        gradients = room(ctx.needs_input_grad[:3], *parameters)
        nll_N = _step(product_dtype(hidden_ND), normaliser, parameters, target_N, token_weight_N, gradients)
        ctx.gradients = (*cast(gradients, *parameters), nll_N if ctx.needs_input_grad[3] else None)
        return (token_weight_N * nll_N).sum()


def _step(
    dtype: torch.dtype,
    normaliser: Normaliser,
    parameters: Sequence[Any],
    target_N: Tensor,
    upstream_N: Tensor | None = None,
    gradients: list[Tensor | None] | None = None,
) -> Tensor:
    """Return the nll and, where ``upstream`` is given, add to the gradients of hidden, weight and bias."""
    hidden_ND, weight_VD, bias_V = parameters
    cast_VD = weight_VD.to(dtype)
    nll_N = zeros(target_N, hidden_ND.dtype)
    for block in blocks(len(hidden_ND), 2 * len(weight_VD)):
        hidden_CD = hidden_ND[block].to(dtype)
        score_CV = upcast(hidden_CD @ cast_VD.T)
        if bias_V is not None:
            score_CV += bias_V
        upstream_C = None if upstream_N is None else upstream_N[block]
        nll_N[block], grad_CV = _block(score_CV, target_N[block], upstream_C, normaliser)
        if gradients is not None and grad_CV is not None:
            accumulate(gradients, block, grad_CV, hidden_CD, cast_VD)
    return nll_N


def _block(
    score_CV: Tensor, target_C: Tensor, upstream_C: Tensor | None, normaliser: Normaliser
) -> tuple[Tensor, Tensor | None]:
    """Return the block's nll and, where ``upstream`` is given, its gradient; the scores are lost."""
    target_C1 = target_C[:, None]
    score_C1 = score_CV.gather(1, target_C1)
    weight_CV, derivative_CV, log_scale_C1 = normaliser.weigh(score_CV)
    others_C1 = weight_CV.scatter_(1, target_C1, 0.0).sum(1, keepdim=True)
    log_weight_C1 = normaliser.log_weight(score_C1) - log_scale_C1
    margin_C1 = log_weight_C1 - others_C1.log()
    nll_C = -F.logsigmoid(margin_C1).squeeze(1)
    if upstream_C is None:
        return nll_C, None
    upstream_C1 = upstream_C[:, None]
    derivative_CV *= upstream_C1 / (others_C1 + log_weight_C1.exp())
    target_grad_C1 = -upstream_C1 * normaliser.slope(score_C1) * torch.sigmoid(-margin_C1)
    return nll_C, derivative_CV.scatter_(1, target_C1, target_grad_C1)
