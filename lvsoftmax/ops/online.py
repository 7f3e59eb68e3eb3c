"""The log-sum-exp of numbers that come piece by piece, and attention that never holds all its scores.

What is known of the numbers seen so far is a pair: the largest, ``m``, and ``s = sum(exp(x - m))``. Pairs form a
commutative monoid,

    (m_a, s_a) + (m_b, s_b) = (m, s_a exp(m_a - m) + s_b exp(m_b - m)),  m = max(m_a, m_b),     with (-inf, 0) as zero,

so that pieces may be blocks of an array, shards in several processes or a stream, taken in any order and grouping. One
pass in place of two (the maximum first, then the sum), each number read once.

Reference: Milakov & Gimelshein 2018, Online normalizer calculation for softmax, section 3.
"""

import functools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lvsoftmax.ops.numerics import product_dtype, upcast
from lvsoftmax.ops.once_differentiable import once_differentiable


class Running(NamedTuple):
    """The largest number seen, and the sum of ``exp(x - largest)`` over all of them; tensors of one shape."""

    maximum: Tensor
    total: Tensor

    def logsumexp(self) -> Tensor:
        """Return ``log(sum(exp(x)))`` of all numbers seen: ``-inf`` if there were none."""
        return self.maximum + self.total.log()


def nothing(shape: tuple[int, ...] | torch.Size, like: Tensor) -> Running:
    """Return the pairs of no numbers: the neutral element of ``merge``."""
    zeros = upcast(like.new_zeros(shape))
    return Running(torch.full_like(zeros, -torch.inf), zeros)


def running(logits: Tensor, dim: int = -1) -> Running:
    """Return the pairs of the numbers along ``dim``, of which there may be none; float32 at least."""
    logits = upcast(logits)
    if logits.shape[dim] == 0:
        return nothing(logits.sum(dim).shape, logits)
    maximum = logits.detach().amax(dim, keepdim=True)
    return Running(maximum.squeeze(dim), (logits - _finite(maximum)).exp().sum(dim))


def merge(a: Running, b: Running) -> Running:
    """Return the pairs of the numbers behind ``a`` and those behind ``b``; associative and commutative.

    Differentiable like the sum it stands for: maxima are constants, by which no result depends.
    """
    maximum = torch.maximum(a.maximum, b.maximum)
    base = _finite(maximum)
    return Running(maximum, a.total * (a.maximum - base).exp() + b.total * (b.maximum - base).exp())


def logsumexp_of(pieces: Iterable[Tensor], dim: int = -1) -> Tensor:
    """Return the log-sum-exp along ``dim`` of pieces as they come, of which one is held at a time.

    Raises:
        ValueError: there is no piece.
    """
    parts = (running(piece, dim) for piece in pieces)
    first = next(parts, None)
    if first is None:
        raise ValueError("no pieces: the shape of the result is unknown; give at least one, which may be empty")
    return functools.reduce(merge, parts, first).logsumexp()


def online_attention(
    query: Tensor, key: Tensor, value: Tensor, block: int = 256, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Return ``softmax(scale query key^T) value``, by blocks of keys, without the matrix of all scores.

    The pair of ``merge`` is joined by the weighted sum of values, which is rescaled with it. Backward the scores are
    computed again, block by block, from the pairs that were kept. The same as
    ``torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)``.

    Letters: N queries, M keys, E and F the widths of keys and values. Costs ``2 N M (E + F)`` FLOPs forward and
    ``2 N M (3 E + 2 F)`` backward, half of that if causal; beyond inputs, output and gradients it holds ``2 N block``
    numbers.

    Reference: Milakov & Gimelshein 2018 for the recurrence; Dao et al. 2022, FlashAttention, for the backward pass.

    Args:
        query: ``[..., N, E]``; the leading dimensions of all three are broadcast.
        key: ``[..., M, E]``.
        value: ``[..., M, F]``.
        block: keys that are looked at together.
        causal: whether query i sees the keys up to i only.
        scale: factor of the scores; ``1 / sqrt(E)`` if None.

    Returns:
        ``[..., N, F]`` in the precision of the inputs; sums are in float32 at least. Differentiable once.

    Raises:
        ValueError: ``block`` is below 1, or there are no keys.
    """
    if block < 1:
        raise ValueError(f"block={block}: must be at least 1")
    if key.shape[-2] == 0:
        raise ValueError("there are no keys: an average needs at least one")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    query, key, value = (x.expand(*batch, *x.shape[-2:]) for x in (query, key, value))
    return _Attention.apply(query, key, value, block, causal, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, block, causal, scale):
        dtype = product_dtype(query)
        q, k, v = (x.to(dtype) for x in (query, key, value))
        output = upcast(torch.zeros(*q.shape[:-1], v.shape[-1], dtype=query.dtype, device=query.device))
        maximum = torch.full_like(output[..., :1], -torch.inf)
        total = torch.zeros_like(maximum)
        room = _room(output, q, k, block)
        for rows, columns in _blocks(q.shape[-2], k.shape[-2], block, causal):
            score = _scores(q, k, rows, columns, causal, scale, room)
            before = maximum[..., rows, :].clone()
            now = torch.maximum(before, score.amax(-1, keepdim=True))
            weight, kept = score.sub_(now).exp_(), before.sub_(now).exp_()
            maximum[..., rows, :] = now
            total[..., rows, :].mul_(kept).add_(weight.sum(-1, keepdim=True))
            output[..., rows, :].mul_(kept).add_(weight.to(dtype) @ v[..., columns, :])
        output /= total
        ctx.save_for_backward(query, key, value, output, maximum, total)
        ctx.options = (dtype, block, causal, scale)
        return output.to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        query, key, value, output, maximum, total = ctx.saved_tensors
        dtype, block, causal, scale = ctx.options
        q, k, v, up = (x.to(dtype) for x in (query, key, value, upstream))
        up_over_total = (upstream / total).to(dtype)
        through_total = (upstream * output).sum(-1, keepdim=True)
        grad_query, grad_key, grad_value = (upcast(torch.zeros_like(x)) for x in (query, key, value))
        rooms = [_room(output, q, k, block) for _ in range(2)]
        for rows, columns in _blocks(q.shape[-2], k.shape[-2], block, causal):
            # Less the maximum, not less the log-sum-exp: a large one has lost the digits of the sum.
            weight = _scores(q, k, rows, columns, causal, scale, rooms[0]).sub_(maximum[..., rows, :]).exp_()
            grad_value[..., columns, :] += weight.to(dtype).mT @ up_over_total[..., rows, :]
            slope = _product(up[..., rows, :], v[..., columns, :].mT, rooms[1]).sub_(through_total[..., rows, :])
            grad_score = weight.mul_(slope).mul_(scale / total[..., rows, :]).to(dtype)
            grad_query[..., rows, :] += grad_score @ k[..., columns, :]
            grad_key[..., columns, :] += grad_score.mT @ q[..., rows, :]
        cast = (grad.to(x.dtype) for grad, x in ((grad_query, query), (grad_key, key), (grad_value, value)))
        return *cast, None, None, None


def _blocks(queries: int, keys: int, block: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Return which keys are looked at together, and which queries see any of them."""
    for start in range(0, min(keys, queries) if causal else keys, block):
        yield slice(start if causal else 0, queries), slice(start, min(start + block, keys))


def _scores(q: Tensor, k: Tensor, rows: slice, columns: slice, causal: bool, scale: float, room: Tensor) -> Tensor:
    score = _product(q[..., rows, :], k[..., columns, :].mT, room).mul_(scale)
    if causal:
        # Keys are at their queries' places; only the first rows come before some of the block's keys.
        size = columns.stop - columns.start
        ahead = torch.ones(size, size, dtype=torch.bool, device=score.device).triu(1)
        corner = score[..., :size, :]
        corner.masked_fill_(ahead[: corner.shape[-2]], -torch.inf)
    return score


def _room(like: Tensor, q: Tensor, k: Tensor, block: int) -> Tensor:
    """Return memory for the scores of one block, used again for each: pages new at every block cost time and peak."""
    return like.new_empty(q[..., 0].numel() * min(block, k.shape[-2]))


def _product(left: Tensor, right: Tensor, room: Tensor) -> Tensor:
    """Return ``left @ right`` in the precision and the memory of ``room``."""
    shape = (*left.shape[:-1], right.shape[-1])
    result = room[: math.prod(shape)].view(shape)
    return torch.matmul(left, right, out=result) if left.dtype == room.dtype else result.copy_(left @ right)


def _finite(maximum: Tensor) -> Tensor:
    """Return what to subtract: the maximum, or 0 where it is infinite and a difference would be no number."""
    return torch.where(maximum.isinf(), 0.0, maximum)
