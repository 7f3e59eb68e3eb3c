"""Runs that are kept: what is copied, and what is said of it."""

import json
import sys

import pytest
from synthetic_runs import make_run

from experiments import ship
from experiments.cli import compose_config
from experiments.reading import NOT_CONDITIONS, flat, read
from experiments.study import KEPT


@pytest.fixture
def root(tmp_path):
    """A root with a trial, a run, one that diverged and one that goes on, and a study of them."""
    root = tmp_path / "outputs"
    kinds = {"0000000a": {"tokens": 1000}, "0000000b": {}, "0000000c": {"status": "diverged"},
             "0000000d": {"status": "running"}}  # fmt: skip
    trial, *runs = [make_run(root, "full_softmax", digits=digits, **kind) for digits, kind in kinds.items()]
    (runs[0] / "checkpoints" / "last.pt").write_bytes(b"large")
    names = [f"sotu/{run.name}" for run in runs]
    record = {
        "layers": [{"search": [{"run": f"sotu/{trial.name}"}, {"run": names[1]}]}], "runs": names, "smoke": []
    }  # fmt: skip
    (root / "studies" / "small-sotu").mkdir(parents=True)
    (root / "studies" / "small-sotu" / "study.json").write_text(json.dumps(record))
    return root


def test_what_has_ended_is_copied_without_checkpoints(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ship", str(root / "studies" / "small-sotu"), "--to", str(tmp_path / "kept")])
    ship.main()
    told = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split(";")[0] for line in told] == ["copied", "copied", "copied", "left out"]
    assert f"its configuration names {root}, which other machines lack" in told[0]
    kept = tmp_path / "kept"
    assert (kept / "studies/small-sotu/study.json").read_text() == (root / "studies/small-sotu/study.json").read_text()
    folders = sorted((kept / "runs" / "sotu").iterdir())
    assert [folder.name[-1] for folder in folders] == ["a", "b", "c"]
    for folder in folders:
        assert {file.name for file in folder.iterdir()} <= set(KEPT)
        assert read(folder).record() == read(root / "sotu" / folder.name).record()
    ship.main()
    assert capsys.readouterr().out.count("there already") == 3


def test_a_run_that_went_on_replaces_what_was_kept_of_it(root, tmp_path):
    kept = tmp_path / "kept"
    ship.ship(root / "studies" / "small-sotu", kept)
    (folder,) = (root / "sotu").glob("*a")
    result = json.loads((folder / "result.json").read_text())
    result["train"]["tokens"] *= 2
    (folder / "result.json").write_text(json.dumps(result))
    assert dict(ship.ship(root / "studies" / "small-sotu", kept))[f"sotu/{folder.name}"].startswith("copied")
    assert read(kept / "runs" / "sotu" / folder.name).result == result


def test_a_damaged_run_among_what_was_kept_is_copied_anew(root, tmp_path):
    kept = tmp_path / "kept"
    ship.ship(root / "studies" / "small-sotu", kept)
    (folder,) = (kept / "runs" / "sotu").glob("*a")
    (folder / "result.json").write_text("{")
    told = dict(ship.ship(root / "studies" / "small-sotu", kept))
    assert told.pop(f"sotu/{folder.name}").startswith("copied")
    assert sorted(what.split(":")[0] for what in told.values()) == ["left out", "there already", "there already"]
    assert read(folder).record() == read(root / "sotu" / folder.name).record()


def test_no_study_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ship", str(tmp_path), "--to", str(tmp_path / "kept")])
    with pytest.raises(SystemExit) as stop:
        ship.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("record", sorted(ship.RESULTS.glob("studies/*/study.json")), ids=lambda path: path.parent.name)
def test_the_command_of_what_ships_still_means_what_was_run(record):
    run = read(ship.RESULTS / "runs" / json.loads(record.read_text())["runs"][0])
    now = flat(compose_config("train", run.environment["command"][1:]))
    then = {key: value for key, value in flat(run.config).items() if not key.startswith(NOT_CONDITIONS)}
    assert {key: now.get(key) for key in then} == then
