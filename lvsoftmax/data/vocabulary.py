"""Words and their ids, which are frequency ranks: word 0 is the most frequent one of the training text."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from typing import final

import numpy as np
from jaxtyping import Int32, Int64

EOS = "<eos>"
"""Ends every line."""

UNK = "<unk>"
"""Stands for every word outside the vocabulary."""


@final
class Vocabulary:
    """The words a model can predict, most frequent first, with their counts in the training text.

    Args:
        words: ``[vocab]`` distinct words, one of them ``<eos>``.
        counts: ``[vocab]`` occurrences of each word in the training text, non-increasing.

    Attributes:
        words: as given, in a list.
        counts: as given.
        eos: the id of ``<eos>``.
        unk: the id of ``<unk>``, None in a vocabulary without it.

    Raises:
        ValueError: fewer than two words, words given twice or without ``<eos>``, counts not of frequency ranks.
    """

    def __init__(self, words: Sequence[str], counts: Int64[np.ndarray, "vocab"]) -> None:
        if len(words) < 2:
            raise ValueError(f"words={list(words)}: a vocabulary needs at least 2 words; give more text")
        if len(words) != len(counts) or counts[-1] < 0 or (counts[1:] > counts[:-1]).any():
            raise ValueError(
                f"counts of {len(words)} words must be {len(words)} numbers that are not negative and never rise; "
                f"got {len(counts)}; sort the words by frequency"
            )
        self.words = list(words)
        self.counts = counts
        if len(self.ids) < len(words):
            raise ValueError(f"words: {len(words) - len(self.ids)} of {len(words)} occur twice; count each word once")
        if EOS not in self.ids:
            raise ValueError(f"words lack {EOS}, which ends every line; add it with its count")
        self.eos = self.ids[EOS]
        self.unk = self.ids.get(UNK)

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of each word."""
        return {word: index for index, word in enumerate(self.words)}

    def encode(self, lines: Iterable[str]) -> Int32[np.ndarray, "tokens"]:
        """Return the ids of the whitespace-separated words of each line, ``<eos>`` after every line.

        Words outside the vocabulary become ``<unk>``.

        Raises:
            ValueError: a word is outside a vocabulary that has no ``<unk>``.
        """
        tokens = chain.from_iterable((*line.split(), EOS) for line in lines)
        if self.unk is not None:
            return np.fromiter((self.ids.get(token, self.unk) for token in tokens), np.int32)
        try:
            return np.fromiter((self.ids[token] for token in tokens), np.int32)
        except KeyError as error:
            raise ValueError(
                f"word {error.args[0]!r} is not in the vocabulary of {len(self)} words, which has no {UNK}; "
                "train with data.min_count=2"
            ) from None


@final
class Interner(dict[str, int]):
    """Numbers words in the order in which they are first asked for; ``<eos>`` is 0.

    Looking a word up numbers it, so that ``map(interner.__getitem__, tokens)`` encodes a text at the speed of a
    dictionary and leaves counting to ``numpy.bincount``.
    """

    def __init__(self) -> None:
        super().__init__({EOS: 0})

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        return number


def rank(
    interner: Interner, counts: Int64[np.ndarray, "types"], *, min_count: int, max_size: int | None
) -> tuple[Vocabulary, Int32[np.ndarray, "types"]]:
    """Choose the vocabulary of a text and rank it by frequency.

    Words of equal count are ranked in order of first appearance. ``<unk>`` takes the count of all words it replaces. It
    is part of the vocabulary where the text holds it, where a word is cut, and where validation or test text has a
    word that training text has not; in the last case its count may be 0.

    Args:
        interner: every word of training, validation and test text.
        counts: ``[types]`` occurrences in the training text of each of them.
        min_count: rarer words are cut; ``<eos>`` and ``<unk>`` never are.
        max_size: largest vocabulary, ``<eos>`` and ``<unk>`` included; None for any.

    Returns:
        The vocabulary, and the id in it of each of the interner's words.

    Raises:
        ValueError: bounds out of range, or no word left but ``<eos>`` and ``<unk>``.
    """
    if min_count < 1:
        raise ValueError(f"data.min_count={min_count}: must be at least 1, which keeps every word of the training text")
    if max_size is not None and max_size < 3:
        raise ValueError(
            f"data.max_size={max_size}: must be at least 3, for {EOS}, {UNK} and a word; null for no bound"
        )
    eos, unk = interner[EOS], interner.get(UNK)
    ordinary = np.ones(len(counts), bool)
    ordinary[[eos] if unk is None else [eos, unk]] = False
    kept = np.flatnonzero(ordinary & (counts >= min_count))
    kept = kept[np.argsort(-counts[kept], kind="stable")]
    needs_unk = unk is not None or len(kept) < ordinary.sum()
    if max_size is not None and len(kept) + 1 + needs_unk > max_size:
        kept, needs_unk = kept[: max_size - 2], True
    if not len(kept):
        raise ValueError(
            f"data.min_count={min_count} leaves no word but {EOS} and {UNK} of the {counts.sum()} training tokens; "
            "lower it or give more text"
        )

    words = list(interner)
    chosen = np.sort(np.append(kept, eos))
    chosen_counts = counts[chosen]
    if needs_unk:
        place = len(chosen) if unk is None else np.searchsorted(chosen, unk)
        chosen_counts = np.insert(chosen_counts, place, counts.sum() - chosen_counts.sum())
        chosen = np.insert(chosen, place, len(words) if unk is None else unk)
        words.append(UNK)
    order = np.argsort(-chosen_counts, kind="stable")
    vocabulary = Vocabulary([words[index] for index in chosen[order]], chosen_counts[order])

    ids = np.full(len(words), -1 if vocabulary.unk is None else vocabulary.unk, np.int32)
    ids[chosen[order]] = np.arange(len(vocabulary), dtype=np.int32)
    return vocabulary, ids[: len(counts)]
