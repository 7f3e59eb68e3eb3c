"""Triton kernels of the ``triton`` backend: tokens of one group against the words of that group. ``gpu.py`` calls them.

Letters: N tokens sorted by group, D hidden, S words of the largest group; BN tokens, BV words and BD columns at a time.
A program's tokens, or its words, are of one group. README.md has the formulas.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def scores(
    hidden,
    weight,
    bias,
    target,
    order,
    first_token,
    last_token,
    first_word,
    last_word,
    score,
    others,
    target_score,
    D,
    S,
    hidden_stride,
    weight_stride,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    """Write the scores ``[N, S]`` of BN tokens, the log of the sum over all words but the target, and the target's."""
    tile = tl.program_id(0)
    end = tl.load(last_token + tile)
    place = tl.load(first_token + tile) + tl.arange(0, BN)
    n = tl.load(order + place, mask=place < end, other=0)
    wanted = tl.load(target + n)
    begin, stop = tl.load(first_word + tile), tl.load(last_word + tile)
    largest = tl.full([BN], float("-inf"), SUM)
    total = tl.zeros([BN], SUM)
    hit = tl.zeros([BN], SUM)
    for start in range(begin, stop, BV):
        word = start + tl.arange(0, BV)
        v = tl.minimum(word, stop - 1)
        z = tl.zeros([BN, BV], SUM)
        for column in range(0, D, BD):
            d = column + tl.arange(0, BD)
            h = tl.load(hidden + n[:, None] * hidden_stride + d[None, :], mask=d[None, :] < D, other=0.0)
            w = tl.load(weight + v[None, :] * weight_stride + d[:, None], mask=d[:, None] < D, other=0.0)
            z = tl.dot(h.to(SUM), w.to(SUM), z, input_precision=PRECISION, out_dtype=SUM)
        z += tl.load(bias + v)[None, :].to(SUM)
        inside = (place < end)[:, None] & (word < stop)[None, :]
        tl.store(score + place[:, None] * S + (word - begin)[None, :], z, mask=inside)
        met = word[None, :] == wanted[:, None]
        hit += tl.sum(tl.where(met, z, 0.0), 1)
        z = tl.where(met | (word >= stop)[None, :], float("-inf"), z)
        raised = tl.maximum(largest, tl.max(z, 1))
        reference = tl.where(raised == float("-inf"), 0.0, raised)
        total = total * tl.exp(largest - reference) + tl.sum(tl.exp(z - reference[:, None]), 1)
        largest = raised
    nothing = total == 0
    log_total = tl.where(nothing, float("-inf"), largest + tl.log(tl.where(nothing, 1.0, total)))
    tl.store(others + n, log_total, mask=place < end)
    exists = (wanted >= begin) & (wanted < stop)
    tl.store(target_score + n, tl.where(exists, hit, float("nan")), mask=place < end)


@triton.jit
@no_type_check
def slope_tile(score, others, pull, target, n, place, word, begin, S, inside):
    """Return the derivatives by the scores of tokens and words, zero where there is none."""
    z = tl.load(score + place[:, None] * S + (word - begin)[None, :], mask=inside, other=float("-inf"))
    met = word[None, :] == tl.load(target + n)[:, None]
    share = tl.exp(tl.where(met | ~inside, float("-inf"), z) - tl.load(others + n)[:, None])
    factor = tl.load(pull + n)[:, None]
    return tl.where(inside, tl.where(met, -factor, factor * share), 0.0)


@triton.jit
@no_type_check
def to_hidden(
    weight,
    target,
    order,
    first_token,
    last_token,
    first_word,
    last_word,
    score,
    others,
    pull,
    result,
    D,
    S,
    weight_stride,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    """Sum slope times row over the words of the group, for BN tokens and BD columns."""
    chunks = tl.cdiv(D, BD)
    tile = tl.program_id(0) // chunks
    d = (tl.program_id(0) % chunks) * BD + tl.arange(0, BD)
    end = tl.load(last_token + tile)
    place = tl.load(first_token + tile) + tl.arange(0, BN)
    n = tl.load(order + place, mask=place < end, other=0)
    begin, stop = tl.load(first_word + tile), tl.load(last_word + tile)
    total = tl.zeros([BN, BD], SUM)
    for start in range(begin, stop, BV):
        word = start + tl.arange(0, BV)
        inside = (place < end)[:, None] & (word < stop)[None, :]
        slope = slope_tile(score, others, pull, target, n, place, word, begin, S, inside)
        there = (word < stop)[:, None] & (d < D)[None, :]
        w = tl.load(weight + word[:, None] * weight_stride + d[None, :], mask=there, other=0.0)
        total = tl.dot(slope, w.to(SUM), total, input_precision=PRECISION, out_dtype=SUM)
    tl.store(result + n[:, None] * D + d[None, :], total, mask=(place < end)[:, None] & (d < D)[None, :])


@triton.jit
@no_type_check
def to_table(
    hidden,
    target,
    order,
    first_token,
    last_token,
    first_word,
    last_word,
    group_word,
    row,
    score,
    others,
    pull,
    result,
    result_bias,
    D,
    S,
    hidden_stride,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    """Sum slope times hidden vector over the tokens of the group, for BV words and BD columns, in the tokens' order."""
    chunks = tl.cdiv(D, BD)
    tile = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    d = chunk * BD + tl.arange(0, BD)
    first, end = tl.load(first_token + tile), tl.load(last_token + tile)
    begin = tl.load(group_word + tile)
    start_word, stop = tl.load(first_word + tile), tl.load(last_word + tile)
    word = start_word + tl.arange(0, BV)
    total = tl.zeros([BV, BD], SUM)
    alone = tl.zeros([BV], SUM)
    for start in range(first, end, BN):
        place = start + tl.arange(0, BN)
        n = tl.load(order + place, mask=place < end, other=0)
        inside = (place < end)[:, None] & (word < stop)[None, :]
        slope = slope_tile(score, others, pull, target, n, place, word, begin, S, inside)
        there = (place < end)[:, None] & (d < D)[None, :]
        h = tl.load(hidden + n[:, None] * hidden_stride + d[None, :], mask=there, other=0.0)
        total = tl.dot(tl.trans(slope), h.to(SUM), total, input_precision=PRECISION, out_dtype=SUM)
        alone += tl.sum(slope, 0)
    to = tl.load(row + tile) + tl.arange(0, BV)
    tl.store(result + to[:, None] * D + d[None, :], total, mask=(word < stop)[:, None] & (d < D)[None, :])
    tl.store(result_bias + to, alone, mask=(word < stop) & (chunk == 0))
