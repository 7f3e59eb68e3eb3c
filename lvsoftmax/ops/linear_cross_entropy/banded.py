"""Cross-entropy of a table whose bands of words read different inputs, by blocks of tokens.

Letters: N tokens, V words in all, C tokens of one block; band ``b`` has inputs ``[N, d_b]`` and a table ``[V_b, d_b]``,
and the bands' logits stand side by side. Everything else is as in ``reference.py``, which is the case of one band.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvsoftmax.ops.linear_cross_entropy.reference import accumulate, blocks, cast, softmax_block, zeros
from lvsoftmax.ops.numerics import product_dtype


def banded_cross_entropy(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], bias_V: Tensor, target_N: Tensor
) -> Tensor:
    """Return ``-log softmax(cat over b of inputs_b @ weights_b.T + bias)[target]`` of each token.

    The backward pass computes the logits again: four products per band in all, memory of one block.
    """
    return _PerToken.apply(target_N, bias_V, *inputs, *weights)


def banded_cross_entropy_loss(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], bias_V: Tensor, target_N: Tensor, token_weight_N: Tensor
) -> Tensor:
    """Return ``sum(token_weight * nll)`` as a scalar, to be differentiated at most once.

    Gradients are computed during the forward pass: three products per band, memory of one block and of the gradients.
    """
    return _WeightedSum.apply(target_N, token_weight_N, bias_V, *inputs, *weights)


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, target_N, *parameters):
        ctx.dtype = product_dtype(parameters[1])
        ctx.save_for_backward(target_N, *parameters)
        return _step(ctx.dtype, target_N, parameters, None, [])

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_N):
        target_N, *parameters = ctx.saved_tensors
        gradients = _room(parameters, ctx.needs_input_grad[1:])
        _step(ctx.dtype, target_N, parameters, upstream_N, gradients)
        return None, *cast(gradients, *parameters)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, target_N, token_weight_N, *parameters):
        needed = ctx.needs_input_grad[2:]
        gradients = _room(parameters, needed)
        upstream_N = token_weight_N if any(needed) else None
        nll_N = _step(product_dtype(parameters[1]), target_N, parameters, upstream_N, gradients)
        ctx.nll_N = nll_N if ctx.needs_input_grad[1] else None
        ctx.gradients = cast(gradients, *parameters)
        return (token_weight_N * nll_N).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        # The gradients leave ctx for good: they are scaled in place, and autograd would copy what somebody still holds.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("this loss can be differentiated once; use the per-token nll to do it again")
        scaled = [None if gradient is None else gradient.mul_(upstream) for gradient in gradients]
        return None, None if ctx.nll_N is None else upstream * ctx.nll_N, *scaled


def _room(parameters: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    return [zeros(x, x.dtype) if asked else None for x, asked in zip(parameters, needed, strict=True)]


def _step(
    dtype: torch.dtype,
    target_N: Tensor,
    parameters: Sequence[Tensor],
    upstream_N: Tensor | None,
    gradients: Sequence[Tensor | None],
) -> Tensor:
    """Return the nll and, where ``upstream`` is given, add to the gradients of bias, inputs and weights."""
    bias_V, *tables = parameters
    count = len(tables) // 2
    inputs, weights = tables[:count], [weight.to(dtype) for weight in tables[count:]]
    sizes = [len(weight) for weight in weights]
    nll_N = zeros(target_N, inputs[0].dtype)
    for block in blocks(len(target_N), len(bias_V)):
        input_C = [x[block].to(dtype) for x in inputs]
        logit_CV = nll_N.new_empty(len(input_C[0]), len(bias_V))
        for x, weight, band_CV in zip(input_C, weights, logit_CV.split(sizes, 1), strict=True):
            band_CV.copy_(x @ weight.T)
        logit_CV += bias_V
        upstream_C = None if upstream_N is None else upstream_N[block]
        nll_N[block], grad_CV = softmax_block(logit_CV, target_N[block], upstream_C)
        if grad_CV is not None:
            grad_bias_V, *grad_tables = gradients
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
            for b, band_CV in enumerate(grad_CV.split(sizes, 1)):
                accumulate([grad_tables[b], grad_tables[count + b], None], block, band_CV, input_C[b], weights[b])
    return nll_N
