"""An inverted multi-index: words in the cells of two codebooks, one for each half of their vectors.

Letters: N tokens, E width of a half, V words, M codewords, K draws of a token, C tokens of one chunk. Masses of words
are integers, see :mod:`lvsoftmax.ops.noise`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lvsoftmax.ops.categorical import Drawn, choose_columns, uniform

UNITS = 2**52  # of all words' masses together
CHUNK = 2**20  # cells' masses held at a time
DISTANCES = 2**24  # held at a time


def fit_codebook(vector_VE: Tensor, codebook_ME: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Return the codebook and every word's codeword after some rounds of k-means, from a codebook to start with.

    A codeword that no word is nearest to moves to a word, each to another. ``2 V M E`` FLOPs a round and one more.
    """
    vocab_size, codewords = len(vector_VE), len(codebook_ME)
    spread_M = torch.arange(codewords, device=vector_VE.device) * vocab_size // codewords
    for _ in range(rounds):
        code_V = _nearest(vector_VE, codebook_ME)
        size_M = vector_VE.new_zeros(codewords).index_add_(0, code_V, vector_VE.new_ones(vocab_size))
        mean_ME = torch.zeros_like(codebook_ME).index_add_(0, code_V, vector_VE) / size_M.clamp(min=1)[:, None]
        codebook_ME = torch.where(size_M[:, None] > 0, mean_ME, vector_VE[spread_M])
    return codebook_ME, _nearest(vector_VE, codebook_ME)


def _nearest(vector_VE: Tensor, codebook_ME: Tensor) -> Tensor:
    square_M = codebook_ME.square().sum(1)
    parts = vector_VE.split(max(DISTANCES // len(codebook_ME), 1))
    return torch.cat([torch.addmm(square_M, part, codebook_ME.T, alpha=-2).argmin(1) for part in parts])


class MultiIndex(NamedTuple):
    """Words by cell: cell ``i M + j`` holds those whose halves are nearest to codewords ``i`` and ``j``."""

    cell: Tensor  # [V] of each word
    mass: Tensor  # [V] of each word
    order: Tensor  # [V] words by cell
    reached: Tensor  # [V] running sum of mass in that order
    cell_mass: Tensor  # [M * M]


def multi_index(first_V: Tensor, second_V: Tensor, codewords: int, prior_V: Tensor) -> MultiIndex:
    """Sort the words into the cells of their two codewords.

    Args:
        first_V: codeword of each word's first half.
        second_V: codeword of its second half.
        codewords: M.
        prior_V: what the words of a cell are drawn in proportion to; sums to about one.
    """
    cell_V = first_V * codewords + second_V
    mass_V = (prior_V.double() * UNITS).round().long().clamp(min=1)
    order_V = cell_V.argsort(stable=True)
    cell_mass = mass_V.new_zeros(codewords * codewords).index_add_(0, cell_V, mass_V)
    return MultiIndex(cell_V, mass_V, order_V, mass_V[order_V].cumsum(0), cell_mass)


def draw_by_cells(
    index: MultiIndex, first_NM: Tensor, second_NM: Tensor, target_N: Tensor, count: int, generator: torch.Generator
) -> Drawn:
    """Draw from ``q(w) ~ mass(w) exp(first[i(w)] + second[j(w)])``: a cell, then a word of it, a search each.

    Args:
        index: the words by cell.
        first_NM: score of the first half's codewords.
        second_NM: score of the second half's.
        target_N: words whose probability is wanted, too.
        count: K.
        generator: of the draws.
    """
    tokens, codewords = first_NM.shape
    size = max(CHUNK // codewords**2, 1)
    log_mass = index.cell_mass.to(first_NM.dtype).log()
    cells, log_sums = [], []
    for first_CM, second_CM in zip(first_NM.split(size), second_NM.split(size), strict=True):
        score = (first_CM[:, :, None] + second_CM[:, None]).flatten(1) + log_mass
        log_sum = score.logsumexp(1, keepdim=True)
        row = torch.arange(len(score), device=score.device).repeat_interleave(count)
        random = uniform(row.shape, generator, row.device)
        cells.append(choose_columns((score - log_sum).exp(), row, random).view(-1, count))
        log_sums.append(log_sum)
    cell_NK, log_sum_N1 = torch.cat(cells), torch.cat(log_sums)
    end = index.cell_mass.cumsum(0)
    share_NK = uniform((tokens, count), generator, target_N.device)
    point_NK = end[cell_NK] - 1 - (share_NK * index.cell_mass[cell_NK]).long()
    ids_NK = index.order[torch.searchsorted(index.reached, point_NK, right=True)]
    word_NC = torch.cat([target_N[:, None], ids_NK], 1)
    cell_NC = index.cell[word_NC]
    log_NC = index.mass[word_NC].to(first_NM.dtype).log() - log_sum_N1
    log_NC += first_NM.gather(1, cell_NC // codewords) + second_NM.gather(1, cell_NC % codewords)
    return Drawn(ids_NK, log_NC[:, 1:], log_NC[:, 0])
