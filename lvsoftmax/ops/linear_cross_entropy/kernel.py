"""Triton kernels of the ``triton`` backend: tiles of logits that never leave the chip but as what is made of them.

Letters: N tokens, D hidden, V words of a table or of a piece of it; a tile is BN tokens by BV words, made of BD
columns at a time. ``gpu.py`` calls them; importing this file imports Triton.

Operands are multiplied in the precision ``DOT`` and summed in ``SUM``. Offsets of rows are 64-bit: tables may have more
than 2^31 entries. Programs of one piece of the table are neighbours, so that its rows are read from memory once.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def capped_logits(
    hidden,
    weight,
    bias,
    n,
    v,
    D,
    hidden_stride,
    weight_stride,
    SOFTCAP: tl.constexpr,
    BIASED: tl.constexpr,
    DOT: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BD: tl.constexpr,
):
    """Return the logits of tokens ``n`` and words ``v``, and their derivatives by what they were before the cap."""
    hidden_row = hidden + n.to(tl.int64)[:, None] * hidden_stride
    weight_row = weight + v.to(tl.int64)[None, :] * weight_stride
    logit = tl.zeros([n.shape[0], v.shape[0]], SUM)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        h = tl.load(hidden_row + d[None, :], mask=d[None, :] < D, other=0.0)
        w = tl.load(weight_row + d[:, None], mask=d[:, None] < D, other=0.0)
        logit = tl.dot(h.to(DOT), w.to(DOT), logit, input_precision=PRECISION, out_dtype=SUM)
    if BIASED:
        logit += tl.load(bias + v)[None, :].to(SUM)
    slope = logit
    if SOFTCAP > 0:
        # tanh and 1 - tanh^2 by exp(-2|x|), which overflows nowhere; the latter keeps its digits as it vanishes.
        fall = tl.exp(-2 * tl.abs(logit / SOFTCAP))
        size = SOFTCAP * (1 - fall) / (1 + fall)
        slope = 4 * fall / ((1 + fall) * (1 + fall))
        logit = tl.where(logit < 0, -size, size)
    return logit, slope


@triton.jit
@no_type_check
def sums(
    hidden,
    weight,
    bias,
    target,
    others,
    target_logit,
    N,
    D,
    V,
    first,
    words,
    hidden_stride,
    weight_stride,
    SOFTCAP: tl.constexpr,
    BIASED: tl.constexpr,
    DOT: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    """Of BN tokens and ``words`` words, whose numbers begin at ``first``: log of the sum over all but the target.

    ``others`` is ``[parts, N]``, to be joined; the target's logit is written by the one program that meets it.
    """
    tiles = tl.cdiv(N, BN)
    part = tl.program_id(0) // tiles
    token = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    n = tl.minimum(token, N - 1)
    wanted = tl.load(target + n) - first
    begin = part * words
    end = tl.minimum(begin + words, V)
    largest = tl.full([BN], float("-inf"), SUM)
    total = tl.zeros([BN], SUM)
    hit = tl.zeros([BN], SUM)
    for start in range(begin, end, BV):
        word = start + tl.arange(0, BV)
        v = tl.minimum(word, V - 1)
        logit, _ = capped_logits(
            hidden, weight, bias, n, v, D, hidden_stride, weight_stride, SOFTCAP, BIASED, DOT, SUM, PRECISION, BD
        )
        met = word[None, :] == wanted[:, None]
        hit += tl.sum(tl.where(met, logit, 0.0), 1)
        logit = tl.where(met | (word[None, :] >= end), float("-inf"), logit)
        raised = tl.maximum(largest, tl.max(logit, 1))
        reference = tl.where(raised == float("-inf"), 0.0, raised)
        total = total * tl.exp(largest - reference) + tl.sum(tl.exp(logit - reference[:, None]), 1)
        largest = raised
    nothing = total == 0
    log_total = tl.where(nothing, float("-inf"), largest + tl.log(tl.where(nothing, 1.0, total)))
    tl.store(others + part.to(tl.int64) * N + token, log_total, mask=token < N)
    tl.store(target_logit + token, hit, mask=(token < N) & (wanted >= begin) & (wanted < end))


@triton.jit
@no_type_check
def slopes(
    hidden,
    weight,
    bias,
    target,
    others,
    others_factor,
    target_factor,
    slope,
    slope_sum,
    N,
    D,
    V,
    first,
    hidden_stride,
    weight_stride,
    SOFTCAP: tl.constexpr,
    BIASED: tl.constexpr,
    SUMMED: tl.constexpr,
    DOT: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    """Of BN tokens and BV words: derivatives by the products, ``[N, V]``, and their sums over the tokens.

    The sums are ``[tiles, V]``, each over BN tokens.
    """
    tiles = tl.cdiv(N, BN)
    tile = tl.program_id(0) % tiles
    token = tile * BN + tl.arange(0, BN)
    word = (tl.program_id(0) // tiles) * BV + tl.arange(0, BV)
    n = tl.minimum(token, N - 1)
    v = tl.minimum(word, V - 1)
    logit, by_product = capped_logits(
        hidden, weight, bias, n, v, D, hidden_stride, weight_stride, SOFTCAP, BIASED, DOT, SUM, PRECISION, BD
    )
    met = word[None, :] == (tl.load(target + n) - first)[:, None]
    # Past the end the last word stands again, whose logit may exceed the sum of the others: it may be a target.
    other = tl.where(met | (word[None, :] >= V), float("-inf"), logit)
    share = tl.exp(other - tl.load(others + n)[:, None])
    by_logit = tl.where(met, tl.load(target_factor + n)[:, None], tl.load(others_factor + n)[:, None] * share)
    if SOFTCAP > 0:
        by_logit *= by_product
    inside = (token[:, None] < N) & (word[None, :] < V)
    place = slope + token.to(tl.int64)[:, None] * V + word[None, :]
    tl.store(place, by_logit.to(slope.dtype.element_ty), mask=inside)
    if SUMMED:
        tl.store(slope_sum + tile * V + word, tl.sum(tl.where(inside, by_logit, 0.0), 0), mask=word < V)
