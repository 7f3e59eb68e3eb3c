"""The synthetic source against dense matrices, and its texts against the source."""

import math

import numpy as np
import pytest

from lvsoftmax.data.vocabulary import EOS
from lvsoftmax.data.zipf import Source, load_zipf, random_source

TOKENS = 400_000


def source_of(vocab_size: int, seed: int = 0, **options) -> Source:
    options = {"mixture": 0.3, "exponent": 1.0, "classes": 8, "successors": 6} | options
    return random_source(vocab_size, **options, generator=np.random.default_rng(seed))


def corpus_of(cache, **options):
    fixed = {"name": "toy", "vocab_size": 300, "train_tokens": TOKENS, "valid_tokens": 2000, "test_tokens": 2000}
    fixed |= {"mixture": 0.3, "exponent": 1.0, "classes": 8, "successors": 20, "seed": 1, "cache": str(cache)}
    return load_zipf(**fixed | options)


def dense(source: Source) -> np.ndarray:
    """p[v, w] = p(w | v), entry by entry from the definition."""
    size = len(source.unigram)
    p = np.empty((size, size))
    for v in range(size):
        successors = source.successors[source.word_class[v]].tolist()
        for w in range(size):
            q = source.successor_probability[successors.index(w)] if w in successors else 0.0
            p[v, w] = source.mixture * source.unigram[w] + (1 - source.mixture) * q
    return p


def stationary(p: np.ndarray) -> np.ndarray:
    """The row vector that p leaves alone, by walking until nothing moves."""
    row = np.full(len(p), 1 / len(p))
    for _ in range(500):
        row = row @ p
    return row


def previous_of(ids: np.ndarray, start: int) -> np.ndarray:
    return np.append(start, ids[:-1])


SOURCES = [
    source_of(50),
    source_of(50, seed=3, mixture=0.05, exponent=1.4),
    source_of(50, seed=4, mixture=1.0),
    source_of(50, seed=5, classes=1, successors=50),
    source_of(50, seed=6, classes=50, successors=1, exponent=0.0),
    source_of(2, seed=7, classes=2, successors=1),
]


@pytest.mark.parametrize("source", SOURCES)
def test_loss_and_entropy_equal_those_of_the_dense_matrix(source):
    p = dense(source)
    size = len(p)
    assert np.allclose(p.sum(1), 1, rtol=0, atol=1e-14)
    assert (p > 0).all()
    previous, ids = np.divmod(np.arange(size * size), size)
    np.testing.assert_allclose(source.nll(ids, previous), -np.log(p).ravel(), rtol=1e-13)

    pi = stationary(p)
    np.testing.assert_allclose(source.word_probability(), pi, rtol=1e-10)
    by_class = [pi[source.word_class == c].sum() for c in range(len(source.successors))]
    np.testing.assert_allclose(source.class_probability(), by_class, rtol=1e-10, atol=1e-15)
    assert source.entropy() == pytest.approx(-pi @ (p * np.log(p)).sum(1), rel=1e-12)


@pytest.mark.parametrize("source", SOURCES)
def test_text_follows_the_source(source):
    ids = source.sample(TOKENS, 0, np.random.default_rng(1))
    assert ids.shape == (TOKENS,)
    p, pi = dense(source), stationary(dense(source))
    # Pairs of words, within five standard errors of independent draws from each row. The bound of four, over 2,500
    # cells, would fail one sample in ten.
    previous = previous_of(ids, 0)
    pairs = np.zeros_like(p)
    np.add.at(pairs, (previous, ids), 1)
    occurrences = pairs.sum(1, keepdims=True)
    error = np.sqrt(occurrences * p * (1 - p))
    enough = occurrences * p > 20
    assert enough.sum() >= 4
    assert (np.abs(pairs - occurrences * p)[enough] < 5 * error[enough]).all()
    # Words, whose counts are correlated, in total variation.
    assert np.abs(np.bincount(ids, minlength=len(pi)) / TOKENS - pi).sum() / 2 < 3 * math.sqrt(len(pi) / TOKENS)


def test_loss_of_a_long_text_is_the_entropy():
    source = source_of(2000, classes=64, successors=128)
    ids = source.sample(TOKENS, 0, np.random.default_rng(2))
    nll = source.nll(ids, previous_of(ids, 0))
    # Means of stretches of 1,000 tokens are independent but for their ends.
    means = nll.reshape(-1, 1000).mean(1)
    assert abs(means.mean() - source.entropy()) < 4 * means.std() / math.sqrt(len(means))


def test_the_word_before_the_text_decides_over_its_first():
    source = source_of(50, mixture=1e-9, successors=1)
    for before in (0, 7, 23):
        assert source.sample(1, before, np.random.default_rng(0))[0] == source.successors[source.word_class[before], 0]


def test_reordered_ids_are_the_same_source():
    source = source_of(50)
    order = np.random.default_rng(5).permutation(50)
    other = source.reordered(order)
    np.testing.assert_array_equal(dense(other), dense(source)[np.ix_(order, order)])
    assert other.entropy() == pytest.approx(source.entropy(), rel=1e-12)


@pytest.mark.parametrize("vocab_size", [2_000, 100_000])
def test_the_word_before_carries_most_of_what_there_is_to_know(vocab_size):
    source = source_of(vocab_size, classes=64, successors=128)
    p = source.word_probability()
    unigram_entropy = -p @ np.log(p)
    assert math.exp(source.entropy() - unigram_entropy) < 0.3


def test_corpus_is_ranked_and_knows_its_source(tmp_path):
    corpus = corpus_of(tmp_path)
    assert len(corpus.vocabulary) == 300
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (TOKENS, 2000, 2000)
    assert np.array_equal(np.bincount(corpus.train, minlength=300), corpus.vocabulary.counts)
    assert corpus.vocabulary.unk is None
    assert corpus.vocabulary.words[corpus.vocabulary.eos] == EOS
    # Word ids of source and texts agree: a source in any other order would be surprised by its own texts.
    nll = corpus.source.nll(corpus.train, previous_of(corpus.train, corpus.vocabulary.eos)).reshape(-1, 1000).mean(1)
    assert abs(nll.mean() - corpus.source.entropy()) < 4 * nll.std() / math.sqrt(len(nll))
    assert np.corrcoef(corpus.source.word_probability(), corpus.vocabulary.counts)[0, 1] > 0.999


def test_words_that_never_occur_stay_in_the_vocabulary(tmp_path):
    corpus = corpus_of(tmp_path, vocab_size=5000, train_tokens=1000)
    unseen = corpus.vocabulary.counts == 0
    assert len(corpus.vocabulary) == 5000
    assert unseen.sum() > 4000
    assert unseen[-unseen.sum() :].all()
    assert (np.diff(corpus.source.word_probability()[unseen]) <= 0).all()
    assert corpus.test.max() > 1000


def test_corpus_is_found_again_and_follows_every_option(tmp_path):
    def load(**options):
        return corpus_of(tmp_path, **{"train_tokens": 5000} | options)

    first, again = load(), load()
    assert len(list(tmp_path.iterdir())) == 1
    assert first.digest == again.digest
    assert np.array_equal(first.train, again.train)
    np.testing.assert_array_equal(dense(first.source), dense(again.source))
    changes = [
        {"vocab_size": 301},
        {"mixture": 0.4},
        {"exponent": 1.1},
        {"classes": 9},
        {"successors": 21},
        {"seed": 2},
    ]
    changes += [{"train_tokens": 5001}, {"valid_tokens": 2001}, {"test_tokens": 2001}]
    assert len({first.digest, *(load(**change).digest for change in changes)}) == 1 + len(changes)


def test_texts_of_one_corpus_are_independent(tmp_path):
    corpus = corpus_of(tmp_path, train_tokens=2000)
    assert not np.array_equal(corpus.train, corpus.valid)
    assert not np.array_equal(corpus.valid, corpus.test)
    # The length of one text leaves the others alone.
    longer = corpus_of(tmp_path, train_tokens=2000, valid_tokens=3000)
    assert np.array_equal(longer.test, corpus.test)


def test_a_million_words_and_two_million_tokens(tmp_path):
    corpus = corpus_of(tmp_path, vocab_size=1_000_000, train_tokens=2_000_000, classes=64, successors=128)
    assert len(corpus.vocabulary) == 1_000_000
    assert corpus.source.word_probability().sum() == pytest.approx(1, rel=1e-9)
    assert corpus.source.word_probability().min() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 1}, "data.vocab_size=1: must be at least 2"),
        ({"mixture": 0.0}, r"data.mixture=0.0: must be in \(0, 1\]"),
        ({"mixture": 1.5}, "data.mixture=1.5"),
        ({"classes": 301}, "data.classes=301: must be from 1 to data.vocab_size=300"),
        ({"successors": 0}, "data.successors=0"),
        ({"successors": 301}, "data.successors=301: must be from 1 to data.vocab_size=300"),
        ({"exponent": -1.0}, "data.exponent=-1.0: must not be negative"),
        ({"test_tokens": 0}, "data.test_tokens=0: must be at least 1"),
    ],
)
def test_bad_parameters(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        corpus_of(tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()
