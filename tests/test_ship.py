"""Runs that are kept: what is copied, and what is said of it."""

import json
import sys

import pytest
from synthetic_runs import make_run

from experiments import ship
from experiments.cli import compose_config
from experiments.reading import NOT_CONDITIONS, flat, read
from experiments.studies import StudyRecord
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
    (root / "studies" / "small-sotu").mkdir(parents=True)
    write_record(root, "full_softmax", [f"sotu/{trial.name}", names[1]], names)
    return root


def write_record(root, layer, trials, runs, smoke=()):
    """Write the record of a study of one layer."""
    search = [{"learning_rate": 0.1, "valid_nll": 5.0, "seconds": 1.0, "run": trial} for trial in trials]
    content = {
        "study": "small", "data": "sotu", "layers": [{"layer": layer, "search": search, "learning_rate": 0.1}],
        "runs": list(runs), "smoke": list(smoke),
    }  # fmt: skip
    (root / "studies" / "small-sotu" / "study.json").write_text(json.dumps(content, indent=1) + "\n")


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


def test_layers_that_a_study_no_longer_has_stay_in_its_record(root, tmp_path):
    kept, study = tmp_path / "kept", root / "studies" / "small-sotu"
    ship.ship(study, kept)
    trial, run, smoke = (
        f"sotu/{make_run(root, layer, digits=digits, tokens=tokens).name}"
        for layer, digits, tokens in (
            ("sampled_softmax", "0000000e", 1000), ("sampled_softmax", "0000000f", 1_000_000),
            ("taylor_softmax", "00000010", 1000),
        )
    )  # fmt: skip
    write_record(root, "sampled_softmax", [trial], [run], [smoke])
    ship.ship(study, kept)
    place = kept / "studies" / "small-sotu" / "study.json"
    found, before = StudyRecord.read(place), [f"sotu/full_softmax-lstm-seed1-0000000{digit}" for digit in "abc"]
    assert [search.layer for search in found.searches] == ["sampled_softmax", "full_softmax"]
    assert found.runs == [run, *before[1:]]  # the one that goes on was never kept
    assert set(found.aside) == {trial, before[0], smoke}
    # What it says of a layer that the study has again is the study's.
    again = f"sotu/{make_run(root, 'full_softmax', digits='00000011').name}"
    write_record(root, "full_softmax", [], [again])
    ship.ship(study, kept)
    found = StudyRecord.read(place)
    assert found.runs == [again, run] and found.smoke == [smoke]
    assert [layer["layer"] for layer in json.loads(place.read_text())["layers"]] == ["full_softmax", "sampled_softmax"]
    # A damaged one is written anew.
    place.write_text("{")
    ship.ship(study, kept)
    assert place.read_text() == (study / "study.json").read_text()


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
