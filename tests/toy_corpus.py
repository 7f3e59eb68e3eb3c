"""A toy text in three parts, and corpora made of it; a folder that holds it is a fixture."""

from pathlib import Path

import numpy as np

from lvsoftmax.data.corpus import Corpus, load_folder, load_text

ROOT = Path(__file__).parent.parent
TEXT = {"train": "b a a\n\na c b é\n", "valid": "a c\n", "test": "b é a\n"}


def folder_corpus(path, cache, **options) -> Corpus:
    options = {"name": "toy", "homepage": "the moon", "min_count": 1, "max_size": None} | options
    return load_folder(path=str(path), cache=str(cache), **options)


def text_corpus(cache, **options) -> Corpus:
    fixed = {"name": "toy", "valid": None, "test": None, "shares": [0.5, 0.25, 0.25], "min_count": 1, "max_size": None}
    return load_text(cache=str(cache), **fixed | options)


def words_of(corpus: Corpus, ids: np.ndarray) -> str:
    return " ".join(corpus.vocabulary.words[i] for i in ids)


def same_text(first: Corpus, second: Corpus) -> bool:
    return (
        first.digest == second.digest
        and first.vocabulary.words == second.vocabulary.words
        and np.array_equal(first.vocabulary.counts, second.vocabulary.counts)
        and all(np.array_equal(getattr(first, split), getattr(second, split)) for split in TEXT)
    )
