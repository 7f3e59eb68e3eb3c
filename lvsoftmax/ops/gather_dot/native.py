"""The ``cpp`` backend: ``kernel.cpp``. Letters as in ``reference.py``, and U words that occur."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lvsoftmax.ops.backends import CppLibrary
from lvsoftmax.ops.buffers import recycled
from lvsoftmax.ops.inputs import check_vocabulary
from lvsoftmax.ops.numerics import upcast
from lvsoftmax.ops.once_differentiable import once_differentiable
from lvsoftmax.ops.pairs import spread

LIBRARY = CppLibrary(Path(__file__).with_name("kernel.cpp"))
C_TYPES = {torch.float32: "float", torch.float64: "double"}


@torch.compiler.disable()
def gather_dot(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, ids_NK: Tensor, *, sparse: bool) -> Tensor:
    """As in ``reference.py``."""
    return _GatherDot.apply(hidden_ND, weight_VD, bias_V, ids_NK, sparse)


class _GatherDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, ids_NK, sparse):
        ids_NK = ids_NK.contiguous()
        check_vocabulary("ids", ids_NK, len(weight_VD))
        x_ND = upcast(hidden_ND).contiguous()
        table_VD, offset_V = (None if x is None else x.to(x_ND.dtype).contiguous() for x in (weight_VD, bias_V))
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, ids_NK)
        ctx.sparse = sparse
        return _products(x_ND, table_VD, offset_V, ids_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_NK):
        hidden_ND, weight_VD, bias_V, ids_NK = ctx.saved_tensors
        x_ND = upcast(hidden_ND).contiguous()
        operands = (upstream_NK.to(x_ND.dtype).contiguous(), x_ND, weight_VD.to(x_ND.dtype).contiguous(), ids_NK)
        needed = list(ctx.needs_input_grad[:3])
        to_hidden_ND, to_weight, to_bias, word_U = _gradients(*operands, needed, ctx.sparse)
        index_U = word_U if ctx.sparse else None
        return (
            to_hidden_ND.to(hidden_ND.dtype) if needed[0] else None,
            spread(to_weight.to(weight_VD.dtype), index_U, weight_VD) if needed[1] else None,
            spread(to_bias.to(bias_V.dtype), index_U, bias_V) if needed[2] else None,
            None,
            None,
        )


@torch.library.custom_op("lvsoftmax::gather_dot_products", mutates_args=(), device_types="cpu")
def _products(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    result = hidden.new_empty(ids.shape)
    (tokens, width), words = hidden.shape, ids.shape[1]
    sizes = (tokens, width, words, torch.get_num_threads())
    LIBRARY.call(f"products_{C_TYPES[hidden.dtype]}", hidden, weight, bias, ids, *sizes, result)
    return result


@torch.library.custom_op("lvsoftmax::gather_dot_gradients", mutates_args=(), device_types="cpu")
def _gradients(
    upstream: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor, needed: Sequence[bool], sparse: bool
) -> list[Tensor]:
    """Return the gradients of hidden, weight and bias, empty where they are not needed, and the words that occur."""
    (tokens, width), words, vocab, pairs = hidden.shape, ids.shape[1], len(weight), ids.numel()
    threads, kind, dtype = torch.get_num_threads(), C_TYPES[hidden.dtype], hidden.dtype
    to_hidden = recycled(hidden.shape if needed[0] else (0,), dtype)
    if needed[0]:
        LIBRARY.call(f"to_hidden_{kind}", upstream, weight, ids, tokens, width, words, threads, to_hidden)
    if not (needed[1] or needed[2]):
        return [to_hidden, hidden.new_empty(0), hidden.new_empty(0), ids.new_empty(0)]
    count, pair = recycled((vocab,), torch.int32), recycled((pairs,), torch.int64)
    word, start = recycled((min(pairs, vocab),), torch.int64), recycled((min(pairs, vocab) + 1,), torch.int64)
    met = LIBRARY.call("sort_pairs", ids, pairs, vocab, count, pair, word, start)
    rows = met if sparse else vocab
    to_weight = recycled((rows, width) if needed[1] else (0,), dtype)
    to_bias = recycled((rows,) if needed[2] else (0,), dtype)
    if not sparse:  # words that no token has
        to_weight.zero_()
        to_bias.zero_()
    wanted = (result if asked else None for result, asked in zip((to_weight, to_bias), needed[1:], strict=True))
    sizes = (met, width, words, int(not sparse), threads)
    LIBRARY.call(f"to_table_{kind}", upstream, hidden, pair, word, start, *sizes, *wanted)
    return [to_hidden, to_weight, to_bias, word[:met].clone()]


@register_flop_formula(torch.ops.lvsoftmax.gather_dot_products)
def _products_flops(hidden, weight, bias, ids, **_):
    return 2 * math.prod(ids) * hidden[1]


@register_flop_formula(torch.ops.lvsoftmax.gather_dot_gradients)
def _gradients_flops(upstream, hidden, weight, ids, needed, sparse, **_):
    return 2 * math.prod(ids) * hidden[1] * (needed[0] + needed[1])
