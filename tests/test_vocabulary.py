"""The vocabulary: ranks by frequency, what becomes of rare and unknown words, what is no vocabulary."""

import numpy as np
import pytest
from toy_corpus import TEXT, folder_corpus, words_of

from lvsoftmax.data.corpus import Corpus
from lvsoftmax.data.vocabulary import EOS, UNK, Interner, Vocabulary, rank


def test_ids_are_frequency_ranks_of_the_training_text(toy, tmp_path):
    corpus = folder_corpus(toy, tmp_path / "cache")
    # Two words of equal count rank in order of appearance: b before c and é.
    assert corpus.vocabulary.words == [EOS, "a", "b", "c", "é"]
    assert corpus.vocabulary.counts.tolist() == [3, 3, 2, 1, 1]
    assert corpus.vocabulary.unk is None
    assert words_of(corpus, corpus.train) == f"b a a {EOS} {EOS} a c b é {EOS}"
    assert words_of(corpus, corpus.valid) == f"a c {EOS}"
    assert corpus.train.dtype == np.int32
    assert isinstance(corpus.train, np.memmap)


def test_rare_words_become_unk_which_takes_their_count(toy, tmp_path):
    corpus = folder_corpus(toy, tmp_path / "cache", min_count=2)
    assert corpus.vocabulary.words == [EOS, "a", "b", UNK]
    assert corpus.vocabulary.counts.tolist() == [3, 3, 2, 2]
    assert words_of(corpus, corpus.test) == f"b {UNK} a {EOS}"


def test_max_size_counts_eos_and_unk(toy, tmp_path):
    corpus = folder_corpus(toy, tmp_path / "cache", max_size=3)
    assert corpus.vocabulary.words == [UNK, EOS, "a"]
    assert corpus.vocabulary.counts.tolist() == [4, 3, 3]
    assert len(folder_corpus(toy, tmp_path / "cache", max_size=5).vocabulary) == 5
    # <unk> takes a place of its own where the minimum count cuts a word.
    assert len(folder_corpus(toy, tmp_path / "cache", max_size=3, min_count=2).vocabulary) == 3


def test_words_that_training_text_lacks_add_unk(toy, tmp_path):
    (toy / "test.txt").write_text("b new\n")
    corpus = folder_corpus(toy, tmp_path / "cache")
    assert corpus.vocabulary.words[-1] == UNK
    assert corpus.vocabulary.counts[-1] == 0
    assert words_of(corpus, corpus.test) == f"b {UNK} {EOS}"


def test_unk_of_the_text_absorbs_cut_words(toy, tmp_path):
    (toy / "train.txt").write_text(f"{UNK} a a a b {UNK}\n")
    corpus = folder_corpus(toy, tmp_path / "cache", min_count=2)
    assert corpus.vocabulary.words == [UNK, "a", EOS]
    assert corpus.vocabulary.counts.tolist() == [3, 3, 1]


@pytest.mark.parametrize("seed", range(20))
def test_rank_agrees_with_counting_by_hand(seed):
    generator = np.random.default_rng(seed)
    alphabet = ["a", "b", "c", "d", "e", UNK][: generator.integers(2, 7)]
    train = [*generator.choice(alphabet, generator.integers(5, 30)), EOS]
    other = [*generator.choice(["a", "b", "x"], 5), EOS]
    interner = Interner()
    numbers = [interner[str(word)] for word in train]
    later = [interner[str(word)] for word in other]
    counts = np.bincount(numbers, minlength=len(interner))
    min_count, max_size = int(generator.integers(1, 4)), [None, 3, 4, 6][generator.integers(4)]
    try:
        vocabulary, ids = rank(interner, counts, min_count=min_count, max_size=max_size)
    except ValueError as error:
        assert max(train.count(word) for word in alphabet if word != UNK) < min_count, error
        return
    decoded = [vocabulary.words[ids[number]] for number in numbers]
    assert all(got in (word, UNK) for got, word in zip(decoded, train, strict=True))
    assert [decoded.count(word) for word in vocabulary.words] == vocabulary.counts.tolist()
    assert max_size is None or len(vocabulary) <= max_size
    kept = set(vocabulary.words) - {UNK, EOS}
    assert all(train.count(word) >= min_count for word in kept)
    cut = {word for word in {*train, *other} - {UNK, EOS} if word not in kept}
    if max_size is None:
        assert all(train.count(word) < min_count for word in cut)
    else:
        most = max((train.count(word) for word in cut if train.count(word) >= min_count), default=0)
        assert most <= min(train.count(word) for word in kept)
    assert (UNK in vocabulary.words) == bool(cut or UNK in train)
    assert all(vocabulary.words[ids[number]] in (w, UNK) for number, w in zip(later, other, strict=True))


def test_encode_and_decode_round_trip(toy, tmp_path):
    corpus = folder_corpus(toy, tmp_path / "cache", min_count=2)
    assert np.array_equal(corpus.vocabulary.encode(TEXT["train"].splitlines()), corpus.train)
    assert corpus.vocabulary.encode(["never seen"]).tolist() == [corpus.vocabulary.unk] * 2 + [corpus.vocabulary.eos]
    assert len(corpus.vocabulary.encode([])) == 0
    with pytest.raises(ValueError, match="'never' is not in the vocabulary of 5 words.*min_count=2"):
        folder_corpus(toy, tmp_path / "cache").vocabulary.encode(["a never"])


@pytest.mark.parametrize(
    ("words", "counts", "message"),
    [
        ([EOS], [3], "at least 2 words"),
        (["a", "b"], [3, 2], "lack <eos>"),
        ([EOS, "a", "a"], [3, 2, 1], "1 of 3 occur twice"),
        ([EOS, "a"], [2, 3], "never rise"),
        ([EOS, "a"], [2, -3], "not negative"),
        ([EOS, "a"], [2], "must be 2 numbers"),
    ],
)
def test_vocabulary_rejects(words, counts, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(words, np.array(counts))


def test_ids_outside_the_vocabulary_are_rejected():
    vocabulary = Vocabulary([EOS, "a"], np.array([2, 1]))
    good = np.array([0, 1], np.int32)
    for bad in (np.array([0, 2], np.int32), np.array([-1], np.int32)):
        with pytest.raises(ValueError, match=r"valid text of corpus toy has word ids .* outside \[0, 2\)"):
            Corpus("toy", vocabulary, good, bad, good, "")
