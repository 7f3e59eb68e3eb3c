"""Bigram distributions that back off to the unigram: sparse tables, draws in constant time, exact probabilities.

Letters: V words, P distinct pairs of neighbours, N tokens, K draws of a token. A word's followers lie side by side in
the table, sorted, and have an alias table of their own, in the integers of :mod:`lvsoftmax.ops.noise`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lvsoftmax.ops.noise import COLUMN, alias_columns

POSITION = 2**42  # as many equally likely numbers choose a column: rows of up to 2^21 followers fit int64


class BigramTable(NamedTuple):
    """For every word, the distribution of the words that follow it in a text."""

    key: Tensor  # [P] previous * V + word, increasing
    mass: Tensor  # [P] count(previous, word) / count(previous), in units of 1 / (followers of previous * COLUMN)
    threshold: Tensor  # [P] units of a pair's column that belong to it; the rest belongs to the pair ``alias``
    alias: Tensor  # [P]
    start: Tensor  # [V + 1] where each word's followers start
    backoff: Tensor  # [V] share of the unigram in what follows each word, in units of 1 / COLUMN


def bigram_table(bigrams_P3: Tensor, vocab_size: int) -> BigramTable:
    """Build the table of ``q(w | v) = (1 - b(v)) count(v, w) / count(v) + b(v) unigram(w)``.

    ``b(v) = followers(v) / (followers(v) + count(v))``: the more different words were seen after a word, the likelier a
    new one (Witten & Bell 1991, method C; interpolated as in Chen & Goodman 1999, section 2.3). A word that nothing was
    seen to follow leaves all to the unigram.

    Args:
        bigrams_P3: rows of previous word, word and count, each pair once or more often.
        vocab_size: V.
    """
    previous, word, count = bigrams_P3.unbind(1)
    key_P, index = torch.unique(previous * vocab_size + word, return_inverse=True)
    count_P = torch.zeros_like(key_P).index_add_(0, index, count)
    word_P = key_P // vocab_size
    start = torch.searchsorted(word_P, torch.arange(vocab_size + 1, device=key_P.device))
    total = torch.cat([count_P.new_zeros(1), count_P.cumsum(0)])
    followers_V, count_V = start.diff(), total[start].diff()
    # Rounding where a pair's mass ends, rather than the mass, makes a word's masses sum to a whole.
    reached_P = total[1:] - total[start[word_P]]
    units_P = (followers_V * COLUMN)[word_P]
    end_P = (reached_P.double() / count_V[word_P] * units_P).long()
    first_P = torch.cat([word_P.new_ones(1, dtype=torch.bool), word_P[1:] != word_P[:-1]])
    mass_P = end_P - torch.where(first_P, 0, end_P.roll(1))
    seen_V = followers_V + count_V
    backoff_V = torch.where(seen_V > 0, followers_V.double() / seen_V, 1.0)
    return BigramTable(key_P, mass_P, *alias_columns(mass_P), start, (backoff_V * COLUMN).round().long().clamp(min=1))


def draw_bigram(table: BigramTable, previous_N: Tensor, unigram_NK: Tensor, generator: torch.Generator) -> Tensor:
    """Draw ``[N, K]`` ids that follow the previous words, given as many draws from the unigram; O(1) each."""
    shape, device = unigram_NK.shape, unigram_NK.device

    def numbers(below: int) -> Tensor:
        return torch.randint(below, shape, generator=generator, device=device)

    start_N1 = table.start[previous_N, None]
    followers_N1 = table.start[previous_N + 1, None] - start_N1
    # A word without followers always backs off; what it would read here must only exist.
    pair_NK = (start_N1 + (numbers(POSITION) * followers_N1 >> 42)).clamp_(max=len(table.key) - 1)
    pair_NK = torch.where(numbers(COLUMN) < table.threshold[pair_NK], pair_NK, table.alias[pair_NK])
    return torch.where(
        numbers(COLUMN) < table.backoff[previous_N, None], unigram_NK, table.key[pair_NK] % (len(table.start) - 1)
    )


def bigram_log_probability(
    table: BigramTable, previous_N: Tensor, ids_NC: Tensor, unigram_log_probability_NC: Tensor
) -> Tensor:
    """Return ``log q(id | previous)``, ``[N, C]``: one binary search per pair."""
    previous_N1 = previous_N[:, None]
    key_NC = previous_N1 * (len(table.start) - 1) + ids_NC
    pair_NC = torch.searchsorted(table.key, key_NC).clamp_(max=len(table.key) - 1)
    followers_N1 = table.start[previous_N1 + 1] - table.start[previous_N1]
    seen_NC = table.mass[pair_NC].float() / COLUMN / followers_N1.clamp(min=1)
    seen_NC = torch.where(table.key[pair_NC] == key_NC, seen_NC, 0.0)
    backoff_N1 = table.backoff[previous_N1]
    kept_N1 = (COLUMN - backoff_N1).float() / COLUMN
    return (kept_N1 * seen_NC + backoff_N1.float() / COLUMN * unigram_log_probability_NC.exp()).log()
