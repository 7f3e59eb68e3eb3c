"""The ``triton`` backend: ``kernel.py``, and for the gradients the kernels of ``lvsoftmax/ops/pairs_gpu.py``.

Letters as in ``reference.py``. The host waits for nothing but the number of rows of a row-sparse gradient; a word that
does not exist has the logit NaN, outside of the CPU.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lvsoftmax.ops.inputs import check_vocabulary
from lvsoftmax.ops.once_differentiable import once_differentiable
from lvsoftmax.ops.pairs import spread
from lvsoftmax.ops.pairs_gpu import table_sums, token_sums
from lvsoftmax.ops.tiles import dense_rows, empty, next_power_of_2, ratio, sum_type, tile_size

WORDS, COLUMNS = 16, 128
"""Of a tile: so many rows are on their way at once."""


@torch.compiler.disable()
def gather_dot(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, ids_NK: Tensor, *, sparse: bool) -> Tensor:
    """As in ``reference.py``."""
    return _GatherDot.apply(hidden_ND, weight_VD, bias_V, ids_NK, sparse)


class _GatherDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, ids_NK, sparse):
        ids_NK = ids_NK.contiguous()
        check_vocabulary("ids", ids_NK, len(weight_VD))
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, ids_NK)
        ctx.sparse = sparse
        return _products(hidden_ND, weight_VD, bias_V, ids_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_NK):
        hidden_ND, weight_VD, bias_V, ids_NK = ctx.saved_tensors
        needed = [*ctx.needs_input_grad[:2], ctx.needs_input_grad[2] and bias_V is not None]
        made = _gradients(upstream_NK.contiguous(), hidden_ND, weight_VD, ids_NK, needed, ctx.sparse)
        to_hidden_ND, to_weight, to_bias, word_U = made
        index_U = word_U if ctx.sparse else None
        return (
            to_hidden_ND.to(hidden_ND.dtype) if needed[0] else None,
            spread(to_weight.to(weight_VD.dtype), index_U, weight_VD) if needed[1] else None,
            spread(to_bias.to(bias_V.dtype), index_U, bias_V) if needed[2] and bias_V is not None else None,
            None,
            None,
        )


@torch.library.custom_op("lvsoftmax::gather_dot_triton_products", mutates_args=())
def _products(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    from lvsoftmax.ops.gather_dot import kernel

    (tokens, words), width = ids.shape, hidden.shape[1]
    result = empty(hidden, (tokens, words))
    if ids.numel() == 0:
        return result
    hidden, weight = dense_rows(hidden), dense_rows(weight)
    tile = tile_size(words, hidden, WORDS)
    with torch.cuda.device_of(hidden):
        kernel.products[(tokens * ratio(words, tile),)](
            *(hidden, weight, None if bias is None else bias.contiguous(), ids, result, width, len(weight), words),
            **{"hidden_stride": hidden.stride(0), "weight_stride": weight.stride(0), "BIASED": bias is not None},
            **{"SUM": sum_type(hidden), "BK": tile, "BD": min(next_power_of_2(width), COLUMNS)},
        )
    return result


@torch.library.custom_op("lvsoftmax::gather_dot_triton_gradients", mutates_args=())
def _gradients(
    upstream: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor, needed: Sequence[bool], sparse: bool
) -> list[Tensor]:
    """Return the gradients of hidden, weight and bias, empty where they are not needed, and the words that occur."""
    tokens, words = ids.shape
    factor, row = upstream.flatten(), ids.flatten()
    to_hidden = token_sums(factor, row, weight, tokens, (words, 1)) if needed[0] else empty(factor, (0,))
    if not (needed[1] or needed[2]):
        return [to_hidden, empty(factor, (0,)), empty(factor, (0,)), row.new_empty(0)]
    token = torch.arange(tokens, device=row.device).repeat_interleave(words)
    to_weight, to_bias, word = table_sums(factor, token, row, hidden, len(weight), sparse)
    return [to_hidden, to_weight, to_bias, row.new_empty(0) if word is None else word]


@register_flop_formula(torch.ops.lvsoftmax.gather_dot_triton_products)
def _products_flops(hidden, weight, bias, ids, **_):
    return 2 * math.prod(ids) * hidden[1]


@register_flop_formula(torch.ops.lvsoftmax.gather_dot_triton_gradients)
def _gradients_flops(upstream, hidden, weight, ids, needed, sparse, **_):
    return 2 * math.prod(ids) * hidden[1] * (needed[0] + needed[1])
