"""Texts and options that make no corpus: one line that names the option, and nothing left behind."""

import pytest
from toy_corpus import folder_corpus, text_corpus

from lvsoftmax.data import text as text_module


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
    monkeypatch.setattr(text_module, "_BLOCK", 4)
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
