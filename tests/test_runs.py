"""What a run keeps of the machine it ran on, and a folder that something went wrong with."""

import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch

from lvsoftmax.data.vocabulary import Vocabulary
from lvsoftmax.runs import RunFolder, build, describe_environment, processor_name

CPU = torch.device("cpu")
WORDS = Vocabulary(["<eos>", "a"], np.array([2, 1]))

TWO = """processor\t: 0
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
flags\t\t: fpu vme

processor\t: 1
cpu family\t: 26
model name\t: Another
"""


def test_processors_of_one_name_are_told_apart_by_family_and_model():
    assert processor_name(TWO) == "AMD EPYC, family 25, model 17"
    assert processor_name(TWO.replace(": 25", ": 26").replace(": 17", ": 2")) == "AMD EPYC, family 26, model 2"
    assert processor_name("model name\t: Neoverse: N1\n") == "Neoverse: N1"
    assert processor_name("Features\t: fp asimd\n") == platform.processor()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_target_": "lvsoftmax.models.lstm.LSTM", "hidden_size": 8, "width": 8}, "LSTM: .*'width'"),
        ({"_target_": "lvsoftmax.models.lstm.LSTM"}, "LSTM: .*'hidden_size'"),
        ({"_target_": "lvsoftmax.models.lstm.GRU"}, "_target_=lvsoftmax.models.lstm.GRU"),
        ({"_target_": "LSTM"}, "_target_=LSTM"),
    ],
)
def test_what_cannot_be_built_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        build(fields)


def test_without_git_there_is_no_revision(monkeypatch):
    monkeypatch.setenv("PATH", "")
    environment = describe_environment(CPU)
    assert environment["revision"] is None and environment["dirty"] is False


def test_a_folder_in_which_nothing_was_written_yet_is_no_obstacle(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "environment.json.part").write_text("{")
    (tmp_path / "lock").touch()
    RunFolder(tmp_path, "a").start({}, WORDS, {}, CPU)
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        RunFolder(tmp_path, "b")


def test_two_processes_do_not_write_into_one_folder(tmp_path):
    pytest.importorskip("fcntl", reason="this system has no locks of this kind")
    program = (
        "import sys, fcntl\n"
        "held = open(sys.argv[1], 'w'); fcntl.lockf(held, fcntl.LOCK_EX)\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        folder = RunFolder(tmp_path, "a")
        with pytest.raises(ValueError, match="is being trained by another process"):
            folder.start({}, WORDS, {}, CPU)
        assert not (tmp_path / "config.yaml").exists()
    folder.start({}, WORDS, {}, CPU)
    assert (tmp_path / "config.yaml").exists()


def test_a_folder_is_locked_once(tmp_path, monkeypatch):
    pytest.importorskip("fcntl", reason="this system has no locks of this kind")
    opened, original = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *rest, **named: opened.append(path) or original(path, *rest, **named))
    folder = RunFolder(tmp_path, "a")
    folder.claim()
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["lock"]
    folder.claim()
    folder.start({}, WORDS, {}, CPU)
    assert opened.count(tmp_path / "lock") == 1


def test_a_folder_keeps_an_id_of_its_own_for_wandb(tmp_path):
    found = []
    for name in ("here", "here", "there"):
        folder = RunFolder(tmp_path / name, "a")
        folder.start({}, WORDS, {}, CPU)
        found.append(folder.wandb_id)
    assert found[0] and found[0] == found[1] != found[2]


def test_metrics_that_lost_their_end_are_not_filled_up(tmp_path):
    folder = RunFolder(tmp_path, "a")
    folder.start({}, WORDS, {}, CPU)
    folder.log(step=1)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    folder.log(step=2)
    folder.save({"step": 2})
    (tmp_path / "metrics.jsonl").write_bytes(before)
    assert folder.restore()["step"] == 2 and (tmp_path / "metrics.jsonl").read_bytes() == before
