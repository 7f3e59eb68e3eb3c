"""Synthetic text from a known source: its entropy, and its own loss on any text, are exact.

Letters in shapes: V words, C classes, S successors of a class, n tokens.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import final

import numpy as np
from jaxtyping import Float64, Int, Int32

from lvsoftmax.data.corpus import SPLITS, Corpus, cached, open_corpus, save_corpus
from lvsoftmax.data.vocabulary import EOS, Vocabulary


@final
@dataclass(frozen=True)
class Source:
    """A first-order source whose conditional distributions have low rank.

    The word v before decides, through its class c(v) alone, over the next word w::

        p(w | v) = a u(w) + (1 - a) s_c(v)(w)

    with u Zipf's law over all words, and s_c concentrated on the S successors of class c, the r-th of which has
    probability q_r whatever the class. Every word always has positive probability. A model with C hidden units can
    represent the source exactly: there are C different conditional distributions.

    Attributes:
        mixture: a, in (0, 1].
        unigram: ``[V]`` u.
        word_class: ``[V]`` c.
        successors: ``[C, S]`` distinct words of each class.
        successor_probability: ``[S]`` q.
    """

    mixture: float
    unigram: Float64[np.ndarray, "vocab"]
    word_class: Int32[np.ndarray, "vocab"]
    successors: Int32[np.ndarray, "classes successors"]
    successor_probability: Float64[np.ndarray, "successors"]

    def nll(self, ids: Int[np.ndarray, "tokens"], previous: Int[np.ndarray, "tokens"]) -> Float64[np.ndarray, "tokens"]:
        """Return ``-log p(ids | previous)`` of each token, in nats; O(n log CS)."""
        keys, probability = self._successor_table
        key = self.word_class[previous].astype(np.int64) * len(self.unigram) + ids
        place = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
        successor = np.where(keys[place] == key, probability[place], 0.0)
        return -np.log(self.mixture * self.unigram[ids] + (1 - self.mixture) * successor)

    def class_probability(self) -> Float64[np.ndarray, "classes"]:
        """Return how often a word is of each class in the long run.

        With U the classes' shares of u and B[c, d] the probability that a successor of class c is of class d, the
        stationary row vector solves ``pi = a U + (1 - a) pi B``.
        """
        classes = len(self.successors)
        share = np.bincount(self.word_class, self.unigram, classes)
        transition = np.zeros((classes, classes))
        rows = np.broadcast_to(np.arange(classes)[:, None], self.successors.shape)
        columns = self.word_class[self.successors]
        np.add.at(transition, (rows, columns), np.broadcast_to(self.successor_probability, self.successors.shape))
        return np.linalg.solve(np.eye(classes) - (1 - self.mixture) * transition.T, self.mixture * share)

    def word_probability(self) -> Float64[np.ndarray, "vocab"]:
        """Return how often each word occurs in the long run."""
        mass = self.class_probability()[:, None] * self.successor_probability
        successor = np.bincount(self.successors.ravel(), mass.ravel(), len(self.unigram))
        return self.mixture * self.unigram + (1 - self.mixture) * successor

    def entropy(self) -> float:
        """Return the entropy of a word given the word before, in nats: what no model can fall below.

        Classes are weighted by ``class_probability``; O(V + CS), since a class differs from u at its successors only.
        """
        base = self.mixture * self.unigram
        without = base[self.successors]
        with_successor = without + (1 - self.mixture) * self.successor_probability
        difference = without * np.log(without) - with_successor * np.log(with_successor)
        return float(self.class_probability() @ difference.sum(1) - base @ np.log(base))

    def sample(self, tokens: int, previous: int, generator: np.random.Generator) -> Int32[np.ndarray, "tokens"]:
        """Draw a text that follows the word ``previous``.

        Exact, without a loop over tokens: a draw from u does not look back, so the text falls into stretches that
        begin with one, and the k-th words of all stretches are drawn at once. The longest stretch has about
        ``log(n) / -log(1 - a)`` words.
        """
        rank = _draw(self.successor_probability, tokens, generator)
        fresh = generator.random(tokens) < self.mixture
        ids = np.empty(tokens + 1, np.int32)  # ids[0] is the word before the text
        ids[0] = previous
        ids[1:][fresh] = _draw(self.unigram, int(fresh.sum()), generator)
        position = np.arange(tokens + 1)
        depth = position - np.maximum.accumulate(np.where(np.append(True, fresh), position, 0))
        by_depth = np.split(np.argsort(depth, kind="stable"), np.cumsum(np.bincount(depth))[:-1])
        for places in by_depth[1:]:
            ids[places] = self.successors[self.word_class[ids[places - 1]], rank[places - 1]]
        return ids[1:]

    def reordered(self, order: Int[np.ndarray, "vocab"]) -> "Source":
        """Return the same source with other ids: new word i is old word ``order[i]``."""
        ids = np.empty(len(order), np.int32)
        ids[order] = np.arange(len(order), dtype=np.int32)
        return Source(
            self.mixture,
            self.unigram[order],
            self.word_class[order],
            ids[self.successors],
            self.successor_probability,
        )

    @cached_property
    def _successor_table(self) -> tuple[np.ndarray, np.ndarray]:
        classes, width = self.successors.shape
        keys = (np.arange(classes)[:, None] * len(self.unigram) + self.successors).ravel()
        order = np.argsort(keys)
        return keys[order], np.tile(self.successor_probability, classes)[order]


def random_source(
    vocab_size: int, *, mixture: float, exponent: float, classes: int, successors: int, generator: np.random.Generator
) -> Source:
    """Draw a source: every word's class, and every class's successors, uniformly at random.

    Both u over words and q over successors follow Zipf's law, ``probability of rank r`` proportional to
    ``r^-exponent``; word 0 is the most frequent word of u.

    Raises:
        ValueError: a parameter is out of range.
    """
    if vocab_size < 2:
        raise ValueError(f"data.vocab_size={vocab_size}: must be at least 2")
    if not 0 < mixture <= 1:
        raise ValueError(f"data.mixture={mixture}: must be in (0, 1], so that every word has positive probability")
    if not 1 <= classes <= vocab_size:
        raise ValueError(f"data.classes={classes}: must be from 1 to data.vocab_size={vocab_size}")
    if not 1 <= successors <= vocab_size:
        raise ValueError(f"data.successors={successors}: must be from 1 to data.vocab_size={vocab_size}")
    if exponent < 0:
        raise ValueError(f"data.exponent={exponent}: must not be negative; 1 is Zipf's law")
    word_class = generator.integers(classes, size=vocab_size, dtype=np.int32)
    chosen = [generator.choice(vocab_size, successors, replace=False) for _ in range(classes)]
    return Source(
        mixture, _zipf(vocab_size, exponent), word_class, np.array(chosen, np.int32), _zipf(successors, exponent)
    )


def load_zipf(
    *,
    name: str,
    vocab_size: int,
    train_tokens: int,
    valid_tokens: int,
    test_tokens: int,
    mixture: float,
    exponent: float,
    classes: int,
    successors: int,
    seed: int,
    cache: str,
) -> Corpus:
    """Draw a source and three texts from it; ids are frequency ranks in the training text.

    Words of equal count, such as those that never occur, are ranked by their probability. ``<eos>`` is the most
    frequent word of the Zipf part and precedes each text; there are no lines and no ``<unk>``.

    Args:
        name: of the corpus.
        vocab_size: V, words of the source; all are in the vocabulary, whether they occur or not.
        train_tokens: length of the training text.
        valid_tokens: of the validation text.
        test_tokens: of the test text.
        mixture: a, the share of words drawn from Zipf's law regardless of the word before.
        exponent: of Zipf's law.
        classes: C, of words that share their successors.
        successors: S, of each class.
        seed: of the source and the texts.
        cache: folder of encoded corpora.

    Returns:
        The corpus; its ``source`` is the source, in terms of the corpus' word ids.

    Raises:
        ValueError: a parameter is out of range.
    """
    lengths = {"train": train_tokens, "valid": valid_tokens, "test": test_tokens}
    for split, tokens in lengths.items():
        if tokens < 1:
            raise ValueError(f"data.{split}_tokens={tokens}: must be at least 1")
    parameters = {"mixture": mixture, "exponent": exponent, "classes": classes, "successors": successors}
    generators = np.random.default_rng(seed).spawn(1 + len(SPLITS))
    source = random_source(vocab_size, **parameters, generator=generators[0])

    def write(folder: Path) -> None:
        texts = [
            source.sample(tokens, 0, generator)
            for tokens, generator in zip(lengths.values(), generators[1:], strict=True)
        ]
        counts = np.bincount(texts[0], minlength=vocab_size)
        order = np.lexsort((-source.word_probability(), -counts))
        ids = np.empty(vocab_size, np.int32)
        ids[order] = np.arange(vocab_size, dtype=np.int32)
        words = [f"w{number}" if number else EOS for number in order.tolist()]
        save_corpus(folder, Vocabulary(words, counts[order]), [ids[text] for text in texts])
        np.save(folder / "order.npy", order)

    key = {"zipf": {"vocab_size": vocab_size, "seed": seed, "tokens": lengths, **parameters}}
    folder = cached(cache, key, write)
    return open_corpus(name, folder, source.reordered(np.load(folder / "order.npy")))


def _zipf(size: int, exponent: float) -> np.ndarray:
    weight = np.arange(1, size + 1, dtype=np.float64) ** -exponent
    return weight / weight.sum()


def _draw(probability: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    cumulative = np.cumsum(probability)
    # Scaled by the last entry, which rounding may leave on either side of 1: no draw falls beyond the last word.
    return np.searchsorted(cumulative, generator.random(size) * cumulative[-1], side="right")
