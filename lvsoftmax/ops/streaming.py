"""How often words occur in a stream, estimated from the distances between their occurrences.

Letters: V words, T words of a stretch of the stream. State is integers, which no cast of a module can touch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

GAP = 2**16  # units of a distance of one word


class StreamingGaps(NamedTuple):
    """Of each word, the running mean of the distances between its occurrences: the inverse of its frequency."""

    gap: Tensor  # [V] in units of 1 / GAP
    last: Tensor  # [V] where it occurred last; negative before its first occurrence
    weight: Tensor  # [V] distances that the mean stands for
    position: Tensor  # [1] where the stream goes on


def gaps_of_counts(counts_V: Tensor) -> StreamingGaps:
    """Return the state at the start of a stream that is expected to follow ``counts``, each raised by one."""
    count_V = counts_V.double() + 1
    gap_V = (count_V.sum() / count_V * GAP).long()
    return StreamingGaps(gap_V, torch.full_like(gap_V, -1), count_V.long(), gap_V.new_zeros(1))


def observe_gaps(state: StreamingGaps, word_T: Tensor, rate: float) -> StreamingGaps:
    """Return the state after a stretch: as if each word of it in turn updated its mean by its distance.

    ``gap <- (1 - a) gap + a distance`` (Yi et al. 2019, algorithm 2, with ``B`` for ``gap``, ``A`` for ``last``) with
    ``a = max(rate, 1 / (weight + 1))``: the plain mean of what was seen, until it forgets. The first occurrence has no
    distance yet.

    The updates of one word are a sum: distance ``i`` of ``m`` counts ``a_i`` times what the later ones keep, the
    product of their ``1 - a``. O(V + T log T), no loop.
    """
    word_S, order_S = word_T.sort(stable=True)
    position_S = state.position + order_S
    size_V = torch.zeros_like(state.gap).index_add_(0, word_T, torch.ones_like(word_T))
    end_V = size_V.cumsum(0)
    start_V = end_V - size_V
    rank_S = torch.arange(len(word_S), device=word_S.device) - start_V[word_S]
    before_S = torch.where(rank_S == 0, state.last[word_S], position_S.roll(1))
    share_S = (1 / (state.weight[word_S] + rank_S + 1)).clamp(min=rate)
    share_S = torch.where(before_S < 0, 0.0, share_S)
    kept = torch.cat([share_S.new_zeros(1), (-share_S).log1p().cumsum(0)])  # its log, over all before
    counted_S = share_S * (kept[end_V[word_S]] - kept[1:]).exp() * (position_S - before_S)
    gap_V = (kept[end_V] - kept[start_V]).exp() * state.gap / GAP
    gap_V = gap_V.index_add(0, word_S, counted_S)
    seen_V = size_V > 0
    last_V = position_S[(end_V - 1).clamp(min=0)] if len(word_S) else state.last
    return StreamingGaps(
        torch.where(seen_V, (gap_V * GAP).round().long().clamp(min=GAP), state.gap),
        torch.where(seen_V, last_V, state.last),
        state.weight + size_V,
        state.position + len(word_T),
    )


def log_frequency(gap_V: Tensor, ids: Tensor) -> Tensor:
    """Return the log of how often ``ids`` occur per word of the stream."""
    return -(gap_V[ids].float() / GAP).log()
