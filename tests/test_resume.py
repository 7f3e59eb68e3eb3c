"""Runs that go on: the same numbers after a kill, larger budgets, what a budget is spent on."""

import gc
import json
import shutil
import signal
import subprocess
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from small_runs import ENVIRONMENT, command, config, metrics

from experiments import train as runs_of_train
from experiments.reading import RunError, read
from experiments.train import spent, train
from lvsoftmax import runs
from lvsoftmax.models.language_model import LanguageModel
from lvsoftmax.ops.linear_cross_entropy.cost_model import CostModel


def test_a_finished_run_is_not_repeated_and_a_larger_budget_continues_it(overrides, capsys):
    result = train(config(overrides, "budget.epochs=1"))
    folder = next(Path(overrides[5].removeprefix("run.root=")).glob("text/*"))
    before = (folder / "metrics.jsonl").stat()
    assert train(config(overrides, "budget.epochs=1")) == result
    assert "is finished" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").stat() == before
    train(config(overrides, "budget.epochs=2"))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    train(config(overrides, "budget.epochs=2", f"run.dir={folder.parent}/at_once"))
    assert metrics(folder) == metrics(folder.parent / "at_once")


def test_a_run_that_has_read_more_than_the_budget_is_none_of_that_budget(overrides, tmp_path):
    folder = tmp_path / "run"
    assert train(config(overrides, f"run.dir={folder}"))
    with pytest.raises(ValueError, match=r"2 epochs, beyond this budget; ask for more, or set run.root"):
        train(config(overrides, "budget.epochs=1", f"run.dir={folder}"))
    assert (folder / "result.json").exists()
    (folder / "result.json").unlink()  # as if it had been killed there
    with pytest.raises(ValueError, match="beyond this budget"):
        train(config(overrides, "budget.epochs=1", f"run.dir={folder}"))
    assert runs.load_config(folder)["budget"]["epochs"] == 2
    assert train(config(overrides, f"run.dir={folder}"))["train"]["epochs"] == 2


@pytest.fixture
def power_cut(monkeypatch):
    """Call it with a number of steps, after which the training ends without warning, once."""

    def after(steps):
        clip, taken = runs_of_train.clip_gradient_norm, []

        def failing(*arguments):
            taken.append(1)
            if len(taken) == steps:
                monkeypatch.setattr(runs_of_train, "clip_gradient_norm", clip)
                raise OSError("the power went out")
            return clip(*arguments)

        monkeypatch.setattr(runs_of_train, "clip_gradient_norm", failing)

    return after


def test_while_a_larger_budget_is_used_up_the_run_is_not_finished(overrides, tmp_path, power_cut):
    words = [*overrides, f"run.dir={tmp_path}/run"]
    assert train(config(words, "budget.epochs=1"))
    power_cut(3)
    with pytest.raises(OSError, match="power"):
        train(config(words))
    with pytest.raises(RunError, match="not finished"):
        read(tmp_path / "run")
    assert train(config(words)) and read(tmp_path / "run").result["train"]["epochs"] == 2


def test_a_result_stays_until_its_run_can_go_on(overrides, tmp_path, monkeypatch):
    words, folder = [*overrides, f"run.dir={tmp_path}/run"], tmp_path / "run"
    train(config(words, "budget.epochs=1"))
    kept = {name: (folder / name).read_bytes() for name in ("config.yaml", "metrics.jsonl", "result.json")}

    def unfit(*_):
        raise RuntimeError("size mismatch")

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "load_state_dict", unfit)
        with pytest.raises(RuntimeError, match="size mismatch"):
            train(config(words))
    assert {name: (folder / name).read_bytes() for name in kept} == kept
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ValueError, match="a result and no checkpoint .* delete the folder .* set run.root or run.dir"):
        train(config(words))
    assert {name: (folder / name).read_bytes() for name in kept} == kept


def test_what_a_run_goes_on_from_is_not_kept(overrides, tmp_path, monkeypatch):
    """It is as large as the model."""
    words = [*overrides, f"run.dir={tmp_path}/run"]
    assert train(config(words, "budget.epochs=1"))
    restore, clip, read, kept = runs.RunFolder.restore, runs_of_train.clip_gradient_norm, [], []

    def noting(folder):
        checkpoint = restore(folder)
        read.extend(map(weakref.ref, checkpoint["model"].values()))
        return checkpoint

    def looking(*arguments):
        gc.collect()
        kept.append(any(tensor() is not None for tensor in read))
        return clip(*arguments)

    monkeypatch.setattr(runs.RunFolder, "restore", noting)
    monkeypatch.setattr(runs_of_train, "clip_gradient_norm", looking)
    assert train(config(words, "budget.epochs=1.1"))
    assert read and kept and not any(kept)


def test_time_in_the_output_layer_is_not_lost_with_the_process(overrides, tmp_path, power_cut, monkeypatch):
    class Seconds:
        """Each step spends one in the output layer, and each announcement one: there is one an epoch."""

        def __init__(self, device):
            self.spent = 0

        def mark(self):
            return 0.0

        def add(self, start):
            self.spent += 1

        def drain(self):
            spent, self.spent = self.spent, 0
            return spent

    monkeypatch.setattr(runs_of_train, "DeviceClock", Seconds)
    words = [*overrides, f"run.dir={tmp_path}/run", "log_every=1000", "evaluate.every_tokens=null"]
    power_cut(20)
    with pytest.raises(OSError, match="power"):
        train(config(words))
    found = train(config(words))["train"]
    assert found["output_share"] * found["seconds"] == pytest.approx(found["steps"] + 2)


def test_where_a_budget_ends_is_nothing_that_a_schedule_sees(overrides, tmp_path):
    """Each validation that it sees divides the rate here: one more would show."""
    words = [*overrides, "schedule=plateau", "schedule.threshold=10.0", "budget.epochs=null"]
    for tokens in (2100, 7000):
        train(config(words, f"budget.tokens={tokens}", f"run.dir={tmp_path}/twice"))
    train(config(words, "budget.tokens=7000", f"run.dir={tmp_path}/once"))
    last = [metrics(tmp_path / name)[-2:] for name in ("once", "twice")]
    assert last[0] == last[1] and last[0][0]["learning_rate"] < 0.1


def test_a_schedule_that_follows_the_budget_makes_it_part_of_the_run(overrides):
    for epochs in (1, 2):
        train(config(overrides, "schedule=cosine", f"budget.epochs={epochs}"))
    assert len(list(Path(overrides[5].removeprefix("run.root=")).glob("text/*"))) == 2


@pytest.mark.parametrize("layer", ["full_softmax", "sampled_softmax"])
def test_killed_twice_a_run_gives_the_numbers_of_an_uninterrupted_one(overrides, tmp_path, layer):
    whole = tmp_path / "whole"
    assert train(config(overrides, f"output={layer}", f"run.dir={whole}"))

    killed = tmp_path / "killed"
    words = [*overrides, f"output={layer}", f"run.dir={killed}"]
    # First while its seventh checkpoint is being written: half of the bytes are there, under the temporary name.
    prelude = (
        "import os, signal, torch\n"
        "save, calls = torch.save, []\n"
        "def interrupted(state, file):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 7:\n"
        "        file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "    save(state, file)\n"
        "torch.save = interrupted\n"
    )
    assert subprocess.run(command(words, prelude), env=ENVIRONMENT).returncode == -signal.SIGKILL
    assert (killed / "checkpoints" / "last.pt.part").exists()
    assert len(metrics(killed)) >= 1
    # Then in the middle of the second epoch, from outside.
    process = subprocess.Popen(command(words), env=ENVIRONMENT)
    while process.poll() is None and not any(line["epoch"] > 1.2 for line in metrics(killed)):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "result.json").exists()

    assert train(config(overrides, f"output={layer}", f"run.dir={killed}"))
    assert metrics(killed) == metrics(whole)
    results = [json.loads((folder / "result.json").read_text()) for folder in (killed, whole)]
    assert results[0]["test"] == results[1]["test"]
    assert not list(killed.rglob("*.part"))


def test_a_run_keeps_the_cutoffs_it_chose(overrides, tmp_path, monkeypatch):
    """Gone on with where costs are others, rebuilt where nothing is known of them."""
    exponentials, calls = np.array([0, 1.0, 0, 0, 0, 0]), np.array([0, 0, 0, 0, 0, 1.0])
    folder, patched = tmp_path / "run", "lvsoftmax.layers.adaptive_softmax.cost_model"
    words = [*overrides, "output=adaptive_softmax", "output.cutoffs=auto", f"run.dir={folder}"]
    monkeypatch.setattr(patched, lambda *_: CostModel(exponentials))
    assert train(config(words, "budget.epochs=1"))
    begun = runs.load_config(folder)["output"]["cutoffs"]
    assert begun
    monkeypatch.setattr(patched, lambda *_: CostModel(calls))
    assert train(config(words))["train"]["epochs"] == 2
    assert runs.load_config(folder)["output"]["cutoffs"] == begun
    monkeypatch.setattr(patched, None)
    assert runs.load(folder).output.bounds[1:-1] == begun


def test_the_first_budget_reached_ends_the_run():
    budget = {"epochs": 10, "tokens": 1000, "seconds": None}
    assert spent(budget, tokens=500, epochs=1, seconds=1e9) == 0.5
    assert spent(budget, tokens=10, epochs=9, seconds=0) == 0.9


def test_seconds_are_those_of_training_and_go_on_after_a_kill(overrides, tmp_path, monkeypatch):
    """Evaluations take no part of a budget in seconds, and what a killed process had used is used."""
    original, clock = runs_of_train.evaluate, SimpleNamespace(now=0.0)

    def slow(*args, **options):
        clock.now += 1000.0
        return original(*args, **options)

    def tick():
        clock.now += 0.5  # read at both ends of a step, which so takes half a second
        return clock.now

    monkeypatch.setattr(runs_of_train, "evaluate", slow)
    monkeypatch.setattr(runs_of_train, "perf_counter", tick)
    words = ["budget.epochs=null", "evaluate.every_tokens=null", "evaluate.every_seconds=4", f"run.dir={tmp_path}/run"]
    first = train(config(overrides, *words, "budget.seconds=10"))
    assert first["train"]["seconds"] == 10 and first["train"]["steps"] == 20
    (tmp_path / "run" / "result.json").unlink()
    second = train(config(overrides, *words, "budget.seconds=25"))
    assert second["train"]["seconds"] == 25 and second["train"]["steps"] == 50
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    valid = [line for line in lines if line["kind"] == "valid"]
    # Every 4 seconds, and at the end of each budget; the epoch's end comes at 16 seconds.
    assert [line["seconds"] for line in valid] == [4, 8, 10, 12, 16, 20, 24, 25]
