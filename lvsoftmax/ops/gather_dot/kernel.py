"""Triton kernel of the ``triton`` backend: a token's products with rows of its own. ``gpu.py`` calls it.

Letters: N tokens, D hidden, V words, K words of a token; BK words and BD columns at a time.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def products(
    hidden,
    weight,
    bias,
    ids,
    result,
    D,
    V,
    K,
    hidden_stride,
    weight_stride,
    BIASED: tl.constexpr,
    SUM: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """Multiply the vector of one token with BK rows; a word that does not exist has the product NaN."""
    blocks = tl.cdiv(K, BK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    k = (tl.program_id(0) % blocks) * BK + tl.arange(0, BK)
    v = tl.load(ids + n * K + k, mask=k < K, other=-1).to(tl.int64)
    known = (v >= 0) & (v < V)
    product = tl.zeros([BK, BD], SUM)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        h = tl.load(hidden + n * hidden_stride + d, mask=d < D, other=0.0)
        w = tl.load(weight + v[:, None] * weight_stride + d[None, :], mask=known[:, None] & (d < D)[None, :], other=0.0)
        product += h.to(SUM)[None, :] * w.to(SUM)
    total = tl.sum(product, 1)
    if BIASED:
        total += tl.load(bias + v, mask=known, other=0.0).to(SUM)
    tl.store(result + n * K + k, tl.where(known, total, float("nan")), mask=k < K)
