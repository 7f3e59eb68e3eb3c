"""Bigrams against a counter, word vectors against a full decomposition and known classes, and who keeps them."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from lvsoftmax.data import statistics
from lvsoftmax.data.corpus import load_text
from lvsoftmax.data.statistics import bigrams, word_vectors
from lvsoftmax.data.zipf import random_source

RNG = np.random.default_rng(3)


def zipf_text(size: int, tokens: int) -> np.ndarray:
    weight = 1 / np.arange(1, size + 1)
    return RNG.choice(size, tokens, p=weight / weight.sum()).astype(np.int32)


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 2000])
@pytest.mark.parametrize("size", [2, 50, 10**6])
def test_bigrams_are_those_of_the_text(size, tokens):
    ids = zipf_text(size, tokens)
    table = bigrams(ids, size)
    assert table.dtype == np.int64 and table.shape[1] == 3
    assert [tuple(row[:2]) for row in table.tolist()] == sorted(set(pairwise(ids.tolist())))
    assert {(a, b): n for a, b, n in table.tolist()} == Counter(pairwise(ids.tolist()))


def matrix_by_the_formula(ids: np.ndarray, size: int, contexts: int) -> np.ndarray:
    count = np.zeros((size, 2 * contexts))
    for before, word in pairwise(ids.tolist()):
        if before < contexts:
            count[word, before] += 1
        if word < contexts:
            count[before, contexts + word] += 1
    margins = np.outer(count.sum(1), count.sum(0))
    return np.sqrt(np.divide(count, margins, out=np.zeros_like(count), where=count > 0))


@pytest.mark.parametrize(("contexts", "most"), [(60, 8), (30, 8), (2, 4)])
def test_vectors_have_the_angles_of_the_full_decomposition(contexts, most):
    """At the width before the largest fall of the singular values (but the first): it is determined up to there."""
    source = random_source(60, mixture=0.2, exponent=1.0, classes=5, successors=9, generator=np.random.default_rng(0))
    ids = source.sample(30_000, 0, np.random.default_rng(1))
    u, singular, _ = np.linalg.svd(matrix_by_the_formula(ids, 60, contexts), full_matrices=False)
    fall = singular[1:most] / np.append(singular, 1e-9)[2 : most + 1]
    width = 2 + int(np.argmax(fall))
    vectors = word_vectors(bigrams(ids, 60), 60, width, contexts)
    assert vectors.shape == (60, width) and vectors.dtype == np.float32
    row = (u * singular)[:, :width]
    row /= np.linalg.norm(row, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors @ vectors.T, row @ row.T, atol=1e-2)


def test_words_with_the_same_successors_point_the_same_way():
    source = random_source(
        2000, mixture=0.3, exponent=1.0, classes=8, successors=40, generator=np.random.default_rng(0)
    )
    text = source.sample(200_000, 0, np.random.default_rng(1))
    order = np.argsort(-np.bincount(text, minlength=2000), kind="stable")
    rank = np.argsort(order)
    vectors = word_vectors(bigrams(rank[text], 2000), 2000, width=16)[:300]
    word_class = source.word_class[order[:300]]
    cosine = vectors @ vectors.T
    np.fill_diagonal(cosine, -1)
    assert (word_class[cosine.argmax(1)] == word_class).mean() > 0.9


def test_words_without_neighbours_have_no_direction_and_all_others_unit_length():
    ids = np.concatenate([zipf_text(30, 500), [40, 30, 40]])  # 40 and 30 only beside each other and at one seam
    vectors = word_vectors(bigrams(ids, 50), 50, width=64, contexts=30)
    seen = np.zeros(50, bool)
    seen[ids[:-2]] = True
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), seen, atol=1e-6)
    assert not word_vectors(bigrams(ids[:1], 50), 50).any()


def test_the_same_text_gives_the_same_vectors_and_leaves_the_global_stream_alone():
    table = bigrams(zipf_text(100, 3000), 100)
    before = torch.get_rng_state()
    first = word_vectors(table, 100)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    np.testing.assert_array_equal(first, word_vectors(table, 100))


def test_vectors_are_single_whatever_the_default_type(request):
    pairs = bigrams(zipf_text(50, 2000), 50)
    expected = word_vectors(pairs, 50)
    request.getfixturevalue("in_double")
    found = word_vectors(pairs, 50)
    assert found.dtype == np.float32 and np.array_equal(found, expected)


@pytest.mark.parametrize("name", ["bigrams", "embeddings"])
def test_a_corpus_computes_a_statistic_once(name, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("a b c a b a\n" * 50)
    options = {"name": "toy", "valid": None, "test": None, "shares": [0.8, 0.1, 0.1], "min_count": 1, "max_size": None}

    def load():
        return load_text(train=str(tmp_path / "text.txt"), cache=str(tmp_path / "cache"), **options)

    first = load()
    statistic = first.statistic(name)
    assert (statistic == statistics.STATISTICS[name](first.train, len(first.vocabulary))).all()
    monkeypatch.setattr(statistics, "STATISTICS", {})
    again = load().statistic(name)
    np.testing.assert_array_equal(again, statistic)
    assert again.flags.writeable
    assert first.digest == load().digest
