"""Triton kernel of the ``triton`` backend: tokens walk up the tree from their targets. ``gpu.py`` calls it.

Letters: N tokens, D hidden, V words, M nodes; BT tokens and BD columns at a time. README.md has the formulas.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def walk(
    hidden,
    weight,
    bias,
    pace,
    node_branch,
    word_branch,
    target,
    nll,
    slope,
    met,
    N,
    D,
    V,
    hidden_stride,
    weight_stride,
    SUM: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Sum the decisions on the path of each token; keep each node met and the derivative by its product, by level."""
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    word = tl.load(target + token, mask=token < N, other=-1)
    exists = (word >= 0) & (word < V)
    branch = tl.load(word_branch + word, mask=exists, other=-1)
    total = tl.where(exists, tl.zeros([BT], SUM), float("nan"))
    level = token  # the place of a token's pair on this level
    while tl.max(branch, 0) >= 0:
        on_path = branch >= 0
        node = tl.where(on_path, branch >> 1, 0)
        product = tl.zeros([BT, BD], SUM)
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            inside = on_path[:, None] & (d < D)[None, :]
            h = tl.load(hidden + token[:, None] * hidden_stride + d[None, :], mask=inside, other=0.0)
            w = tl.load(weight + node.to(tl.int64)[:, None] * weight_stride + d[None, :], mask=inside, other=0.0)
            product += h.to(SUM) * w.to(SUM)
        sign = tl.where(branch % 2 == 0, 1.0, -1.0).to(SUM)
        factor = sign * tl.load(pace + node, mask=on_path, other=0.0).to(SUM)
        sure = factor * (tl.sum(product, 1) + tl.load(bias + node, mask=on_path, other=0.0).to(SUM))
        # log(1 + e) to the last digit (Kahan): what rounding makes of 1 + e is divided out again.
        e = tl.exp(-tl.abs(sure))
        raised = 1.0 + e
        lost = tl.where(raised == 1.0, 1.0, raised - 1.0)
        log_raised = tl.where(raised == 1.0, e, tl.log(raised) * (e / lost))
        doubt = tl.where(sure < 0, 1.0, e) / raised
        total += tl.where(on_path, tl.maximum(-sure, 0.0) + log_raised, 0.0)
        tl.store(slope + level, -factor * doubt, mask=on_path)
        tl.store(met + level, node, mask=on_path)
        branch = tl.load(node_branch + node, mask=on_path, other=-1)
        level += N
    tl.store(nll + token, total, mask=token < N)
