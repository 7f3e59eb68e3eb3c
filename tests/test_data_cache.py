"""The cache of corpora: found again, never half written, shared by processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from toy_corpus import ROOT, TEXT, folder_corpus, same_text

from lvsoftmax.data import corpus as corpus_module
from lvsoftmax.data.corpus import cached, open_corpus


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
