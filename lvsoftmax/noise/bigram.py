"""Draws that depend on the word before."""

import math

import numpy as np
import torch
from torch import Generator, Tensor, nn

from lvsoftmax.noise.independent import IndependentNoise
from lvsoftmax.ops import bigram as ops
from lvsoftmax.ops.noise import Sample


class BigramNoise(nn.Module):
    """Draws K words of its own for each token from ``q(w | previous)``, with replacement.

    ``q(w | v) = (1 - b(v)) count(v, w) / count(v) + b(v) unigram(w)`` with ``b`` the weight of Witten & Bell 1991, see
    :func:`lvsoftmax.ops.bigram.bigram_table`: every word keeps the probability that the unigram gives it, times
    ``b(v) > 0``. Bengio & Senecal 2003 draw from such a distribution.

    A draw costs O(1), its log-probability a binary search among the P pairs of the table; memory is ``32 P + 16 V``
    bytes and the unigram's tables.

    Args:
        counts: ``[vocab]`` training frequency of each word.
        bigrams: ``[pairs, 3]`` int64 rows of previous word, word and count, or the path of an .npy file of them.
        power: exponent of the unigram's weights.
        count: K.

    Raises:
        ValueError: ``bigrams`` is missing, cannot be read, or belongs to another vocabulary.
    """

    distinct = False
    holds_targets = False

    key: Tensor
    mass: Tensor
    threshold: Tensor
    alias: Tensor
    start: Tensor
    backoff: Tensor

    def __init__(self, counts: Tensor, bigrams: Tensor | str | None, power: float, count: int) -> None:
        super().__init__()
        self.count = count
        self.unigram = IndependentNoise(counts, "unigram", power, count, per_token=True)
        pairs = _pairs(bigrams, len(counts)).to(counts.device)
        for name, column in ops.bigram_table(pairs, len(counts))._asdict().items():
            self.register_buffer(name, column)

    def draw(self, hidden: Tensor, target: Tensor, previous: Tensor | None, generator: Generator) -> Sample:
        """Draw ``[tokens, K]`` words; ``log_expected`` is ``log(K q)``."""
        if previous is None:
            raise ValueError(
                "previous=None: noise=bigram draws by the word before each target; pass it as previous, or choose "
                "another noise"
            )
        table = ops.BigramTable(self.key, self.mass, self.threshold, self.alias, self.start, self.backoff)
        unigram = self.unigram.draw(hidden, target, previous, generator)
        ids = ops.draw_bigram(table, previous, unigram.ids, generator)
        words = torch.cat([target[:, None], ids], 1)
        log_unigram = self.unigram.log_expected(words) - math.log(self.count)
        log_expected = ops.bigram_log_probability(table, previous, words, log_unigram) + math.log(self.count)
        return Sample(ids, log_expected[:, 1:], log_expected[:, 0])

    def observe(self, target: Tensor) -> None:
        """Nothing: the distribution is fixed."""

    def refresh(self, weight: Tensor, bias: Tensor | None) -> None:
        """Nothing: the distribution is fixed."""


def _pairs(bigrams: Tensor | str | None, vocab_size: int) -> Tensor:
    """Return the table of pairs, checked."""
    if bigrams is None:
        raise ValueError(
            "bigrams=None: noise=bigram needs a table of previous word, word and count; set bigrams=text to count "
            "the training text, or give a tensor or the path of an .npy file"
        )
    if isinstance(bigrams, str):
        try:
            bigrams = torch.from_numpy(np.load(bigrams))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"bigrams={bigrams!r}: cannot be read; give the path of an .npy file") from error
    if bigrams.ndim != 2 or bigrams.shape[1] != 3 or not len(bigrams) or bigrams.is_floating_point():
        raise ValueError(
            f"bigrams has shape {list(bigrams.shape)} and type {bigrams.dtype}: give rows of three whole numbers, "
            "previous word, word and count, at least one"
        )
    bigrams = bigrams.long()
    words, count = bigrams[:, :2], bigrams[:, 2]
    if words.min() < 0 or words.max() >= vocab_size:
        raise ValueError(
            f"bigrams is of another vocabulary: its words reach from {words.min().item()} to {words.max().item()}, but "
            f"there are {vocab_size}; count them in a text encoded with this vocabulary, or set bigrams=text"
        )
    if count.min() < 1:
        raise ValueError(f"bigrams has a count of {count.min().item()}: leave out the pairs that do not occur")
    return bigrams
