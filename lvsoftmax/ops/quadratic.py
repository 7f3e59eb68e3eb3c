"""Sums of squared products without the products.

Letters: N tokens, D hidden, V words, L blocks of B words, F features, C tokens of one chunk.

``sum_w f_w <h, w>^2 = h' M h`` with ``M = sum_w f_w w w'``, for any number of words. With the features ``h_i h_j`` of
one triangle of ``h h'`` in a row, the sums over many blocks are one matrix product.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

STRIP = 32  # rows of h h' handled at once; its diagonal squares are kept whole, which makes F = D (D + 32) / 2
CHUNK = 2**22  # features held at a time: 16 MiB in float32


def block_statistics(weight_VD: Tensor, factor_V: Tensor, block_size: int) -> Tensor:
    """Return the coefficients of ``sum_w factor_w <h, w>^2`` over each block, ``[L, F]``: ``2 V D^2`` FLOPs."""
    return torch.stack([
        _coefficients((rows_BD * factor_B[:, None]).T @ rows_BD)
        for rows_BD, factor_B in zip(weight_VD.split(block_size), factor_V.split(block_size), strict=True)
    ])  # fmt: skip


def sums_of_squares(hidden_ND: Tensor, statistic_LF: Tensor) -> Tensor:
    """Return ``sum_w factor_w <h, w>^2`` over each block, ``[N, L]``: about ``D^2`` FLOPs each."""
    features = statistic_LF.shape[1]
    size = max(CHUNK // features, 1)
    room_CF = hidden_ND.new_empty(min(size, len(hidden_ND)), features)
    return torch.cat(
        [_features(chunk_CD, room_CF[: len(chunk_CD)]) @ statistic_LF.T for chunk_CD in hidden_ND.split(size)]
    )


def _strips(hidden_size: int) -> Iterator[tuple[int, int, slice]]:
    """Yield the first row of each strip of the triangle, the row after it, and its place among the features."""
    start = 0
    for first in range(0, hidden_size, STRIP):
        after = min(first + STRIP, hidden_size)
        end = start + (after - first) * (hidden_size - first)
        yield first, after, slice(start, end)
        start = end


def _features(hidden_CD: Tensor, out_CF: Tensor) -> Tensor:
    for first, after, place in _strips(hidden_CD.shape[1]):
        strip = out_CF[:, place].unflatten(1, (after - first, -1))
        torch.mul(hidden_CD[:, first:after, None], hidden_CD[:, None, first:], out=strip)
    return out_CF


def _coefficients(matrix_DD: Tensor) -> Tensor:
    # What lies right of a strip's square stands for its mirror image, too.
    strips = []
    for first, after, _ in _strips(len(matrix_DD)):
        strip = matrix_DD[first:after, first:].clone()
        strip[:, after - first :] *= 2
        strips.append(strip.flatten())
    return torch.cat(strips)
