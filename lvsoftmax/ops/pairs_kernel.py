"""Triton kernels for lists of pairs of a token and a row of a table; ``pairs_gpu.py`` calls them.

Letters: N tokens, D hidden, K pairs of a token, M rows of the table, Q pieces of the pairs of U rows that occur; BT
tokens, BQ pieces or rows and BD columns at a time. Sums are taken in the precision ``SUM``, in one order. Offsets of
rows are 64-bit.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def token_sums(
    factor,
    row,
    table,
    result,
    N,
    D,
    K,
    M,
    token_stride,
    pair_stride,
    table_stride,
    SUM: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Sum ``factor * table[row]`` over the pairs of each token; a row that does not exist marks what is no pair."""
    tiles = tl.cdiv(N, BT)
    token = (tl.program_id(0) % tiles).to(tl.int64) * BT + tl.arange(0, BT)
    d = (tl.program_id(0) // tiles) * BD + tl.arange(0, BD)
    total = tl.zeros([BT, BD], SUM)
    for k in range(0, K):
        pair = token * token_stride + k * pair_stride
        r = tl.load(row + pair, mask=token < N, other=-1).to(tl.int64)
        known = (r >= 0) & (r < M)
        f = tl.load(factor + pair, mask=known, other=0.0).to(SUM)
        w = tl.load(table + r[:, None] * table_stride + d[None, :], mask=known[:, None] & (d < D)[None, :], other=0.0)
        total += f[:, None] * w.to(SUM)
    tl.store(result + token[:, None] * D + d[None, :], total, mask=(token < N)[:, None] & (d < D)[None, :])


@triton.jit
@no_type_check
def piece_sums(
    factor,
    token,
    hidden,
    begin,
    end,
    place,
    result,
    result_bias,
    partial,
    partial_bias,
    Q,
    D,
    hidden_stride,
    SUM: tl.constexpr,
    BQ: tl.constexpr,
    BD: tl.constexpr,
):
    """Sum ``factor * hidden[token]`` over each piece of the sorted pairs, and the factors alone.

    ``place`` is the row of the result that takes the sums; if it is negative, they are one of several shares of a row
    and go to row ``-1 - place`` of ``partial``. Pieces without pairs go nowhere.
    """
    tiles = tl.cdiv(Q, BQ)
    piece = (tl.program_id(0) % tiles) * BQ + tl.arange(0, BQ)
    chunk = tl.program_id(0) // tiles
    d = chunk * BD + tl.arange(0, BD)
    first = tl.load(begin + piece, mask=piece < Q, other=0)
    count = tl.load(end + piece, mask=piece < Q, other=0) - first
    to = tl.load(place + piece, mask=piece < Q, other=0).to(tl.int64)
    total = tl.zeros([BQ, BD], SUM)
    alone = tl.zeros([BQ], SUM)
    for i in range(0, tl.max(count, 0)):
        t = tl.load(token + first + i, mask=i < count, other=0).to(tl.int64)
        f = tl.load(factor + first + i, mask=i < count, other=0.0).to(SUM)
        inside = (i < count)[:, None] & (d < D)[None, :]
        h = tl.load(hidden + t[:, None] * hidden_stride + d[None, :], mask=inside, other=0.0)
        total += f[:, None] * h.to(SUM)
        alone += f
    whole = (count > 0) & (to >= 0)
    share = (count > 0) & (to < 0)
    tl.store(result + to[:, None] * D + d[None, :], total, mask=whole[:, None] & (d < D)[None, :])
    tl.store(partial + (-1 - to)[:, None] * D + d[None, :], total, mask=share[:, None] & (d < D)[None, :])
    tl.store(result_bias + to, alone, mask=whole & (chunk == 0))
    tl.store(partial_bias + (-1 - to), alone, mask=share & (chunk == 0))


@triton.jit
@no_type_check
def join_pieces(
    partial,
    partial_bias,
    begin,
    pieces,
    place,
    result,
    result_bias,
    U,
    D,
    SUM: tl.constexpr,
    BQ: tl.constexpr,
    BD: tl.constexpr,
):
    """Add up the shares of the rows that have more than one."""
    tiles = tl.cdiv(U, BQ)
    row = (tl.program_id(0) % tiles) * BQ + tl.arange(0, BQ)
    chunk = tl.program_id(0) // tiles
    d = chunk * BD + tl.arange(0, BD)
    count = tl.load(pieces + row, mask=row < U, other=0)
    count = tl.where(count > 1, count, 0)
    first = tl.load(begin + row, mask=count > 0, other=0).to(tl.int64)
    to = tl.load(place + row, mask=count > 0, other=0).to(tl.int64)
    total = tl.zeros([BQ, BD], SUM)
    alone = tl.zeros([BQ], SUM)
    for i in range(0, tl.max(count, 0)):
        inside = (i < count)[:, None] & (d < D)[None, :]
        total += tl.load(partial + (first + i)[:, None] * D + d[None, :], mask=inside, other=0.0)
        alone += tl.load(partial_bias + first + i, mask=i < count, other=0.0)
    tl.store(result + to[:, None] * D + d[None, :], total, mask=(count > 0)[:, None] & (d < D)[None, :])
    tl.store(result_bias + to, alone, mask=(count > 0) & (chunk == 0))
