"""Cross-entropy of a table whose bands of words read different inputs.

Letters: N tokens, V words in all, C tokens of one block, B bands; band ``b`` has inputs ``[N, d_b]`` and a table
``[V_b, d_b]``, and the bands' logits stand side by side. README.md beside this file, Relatives, says how they are put
together.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lvsoftmax.ops.gradients_in_forward import GradientsInForward, is_differentiated
from lvsoftmax.ops.linear_cross_entropy.autograd import BACKENDS, KERNELS
from lvsoftmax.ops.linear_cross_entropy.reference import accumulate, blocks, cast, room, softmax_block, zeros
from lvsoftmax.ops.numerics import product_dtype, softplus, sum_dtype
from lvsoftmax.ops.once_differentiable import once_differentiable


def banded_cross_entropy(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], bias_V: Tensor, target_N: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Return ``-log softmax(cat over b of inputs_b @ weights_b.T + bias)[target]`` of each token.

    The backward pass computes the logits again: four products per band in all, memory of one block.
    """
    kernel = BACKENDS.choose(backend, target_N.device)
    return _PerToken.apply(kernel, target_N, bias_V, *inputs, *weights)


def banded_cross_entropy_loss(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias_V: Tensor,
    target_N: Tensor,
    token_weight_N: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Return ``sum(token_weight * nll)`` as a scalar, to be differentiated at most once.

    The ``eager`` backend computes gradients during the forward pass: three products per band, memory of one block and
    of the gradients. To the others logits are cheaper than memory for those of all bands: four products.
    """
    kernel = BACKENDS.choose(backend, target_N.device)
    token_weight_N = token_weight_N.to(sum_dtype(inputs[0]))
    if kernel != "eager" or not is_differentiated(bias_V, *inputs, *weights):
        return (token_weight_N * _PerToken.apply(kernel, target_N, bias_V, *inputs, *weights)).sum()
    return _WeightedSum.apply(bias_V, *inputs, *weights, token_weight_N, target_N)


class _PerToken(torch.autograd.Function):
    """Every band by itself, as far as that goes: its sum of exponentials, and its gradients from the sum of all."""

    @staticmethod
    def forward(ctx, kernel, target_N, bias_V, *tables):
        ctx.kernel, ctx.dtype = kernel, product_dtype(tables[0])
        others_N = zeros(target_N, tables[0].dtype).fill_(-torch.inf)
        target_logit_N = torch.full_like(others_N, torch.nan)  # of a target in no band
        logits = []
        for _, operands, inside_N in _bands(target_N, bias_V, tables):
            sum_N, logit_N = KERNELS[kernel].sums(ctx.dtype, *operands, 0.0)
            # Without the target, a band has a word of its own in the target's place, which is one of the others.
            sum_N = torch.where(inside_N, sum_N, torch.logaddexp(sum_N, logit_N))
            others_N = torch.logaddexp(others_N, sum_N)
            target_logit_N = torch.where(inside_N, logit_N, target_logit_N)
            logits.append(logit_N)
        ctx.save_for_backward(others_N, target_logit_N, target_N, bias_V, *tables, *logits)
        return softplus(others_N - target_logit_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_N):
        _, _, bias_needed, *needed = ctx.needs_input_grad
        others_N, target_logit_N, target_N, bias_V, *saved = ctx.saved_tensors
        tables, logits = saved[: len(needed)], saved[len(needed) :]
        count = len(tables) // 2
        pull_N = upstream_N * torch.sigmoid(others_N - target_logit_N)
        others_N = others_N.clamp(min=torch.finfo(others_N.dtype).min)
        grad_bias: list[Tensor | None] = []
        grad_tables: list[Tensor | None] = [
            torch.zeros_like(x) if asked and not len(weight) else None
            for x, weight, asked in zip(tables, 2 * tables[count:], needed, strict=True)
        ]
        bands = _bands(target_N, bias_V, tables)
        for (b, operands, inside_N), logit_N in zip(bands, logits, strict=True):
            target_factor_N = torch.where(inside_N, -pull_N, pull_N * (logit_N - others_N).exp())
            wanted = needed[b], needed[count + b], bias_needed
            found = KERNELS[ctx.kernel].gradients(ctx.dtype, *operands, 0.0, others_N, pull_N, target_factor_N, wanted)
            grad_tables[b], grad_tables[count + b], grad_bias_band = cast(found, *operands[:3])
            grad_bias.append(grad_bias_band)
        grad_bias_V = torch.cat([part for part in grad_bias if part is not None]) if bias_needed else None
        return None, None, grad_bias_V, *grad_tables


def _bands(
    target_N: Tensor, bias_V: Tensor, tables: Sequence[Tensor]
) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor, Tensor], Tensor]]:
    """Yield of every band with words its number, its input, table, bias and targets, and whether these are in it."""
    count, first = len(tables) // 2, 0
    for b, (x, weight) in enumerate(zip(tables[:count], tables[count:], strict=True)):
        size = len(weight)
        if size:
            local_N = target_N - first
            inside_N = (local_N >= 0) & (local_N < size)
            operands = x, weight, bias_V[first : first + size], local_N.clamp(0, size - 1)
            yield b, operands, inside_N
        first += size


class _WeightedSum(GradientsInForward):
    @staticmethod
    def forward(ctx, *inputs):
        *parameters, token_weight_N, target_N = inputs
        *needed, weight_needed, _ = ctx.needs_input_grad
        gradients = room(needed, *parameters)
        nll_N = _step(product_dtype(parameters[1]), target_N, parameters, token_weight_N, gradients)
        ctx.gradients = (*cast(gradients, *parameters), nll_N if weight_needed else None)
        return (token_weight_N * nll_N).sum()


def _step(
    dtype: torch.dtype,
    target_N: Tensor,
    parameters: Sequence[Tensor],
    upstream_N: Tensor,
    gradients: Sequence[Tensor | None],
) -> Tensor:
    """Return the nll and add to the gradients of bias, inputs and weights."""
    bias_V, *tables = parameters
    grad_bias_V, *grad_tables = gradients
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
        nll_N[block], grad_CV = softmax_block(logit_CV, target_N[block], upstream_N[block])
        if grad_bias_V is not None:
            grad_bias_V += grad_CV.sum(0)
        for b, band_CV in enumerate(grad_CV.split(sizes, 1)):
            accumulate([grad_tables[b], grad_tables[count + b], None], block, band_CV, input_C[b], weights[b])
    return nll_N
