"""Keep what a study found: ``python -m experiments.ship outputs/studies/chen2015-ptb [--to experiments/results]``.

Its runs and trials that have ended are copied to ``runs``, without their checkpoints, and its ``study.json`` to
``studies``. There the report finds them, and studies take them as finished whose ``study.finished`` names the folder.
What is there already is left as it is, except a run that went on since or is damaged, and the study's record. That
keeps what it says of layers which the study no longer has.
"""

import argparse
import json
import shutil
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import Any

from experiments.cli import one_line_errors
from experiments.reading import Run, RunError, read
from experiments.setting import layer_identity
from experiments.studies import StudyRecord
from experiments.study import copy

RESULTS = Path(__file__).parent / "results"


def ship(study: Path, to: Path) -> list[tuple[str, str]]:
    """Copy a study's runs and its record, and return what became of each run.

    Args:
        study: folder with ``study.json``, in ``studies`` under the root of the runs.
        to: where to copy to.

    Raises:
        FileNotFoundError: there is no such study.
    """
    text = (study / "study.json").read_text(encoding="utf-8")
    root = study.resolve().parent.parent
    kept = to / "runs"
    content, told = json.loads(text), []
    compared: set[str] = set()
    for name in names(content):
        try:
            run = read(root / name)
        except RunError as reason:
            told.append((name, f"left out: {reason}"))
            continue
        if name not in content["smoke"]:
            compared.add(layer_identity(run))
        if holds(kept / name, run):
            told.append((name, "there already"))
            continue
        shutil.rmtree(kept / name, ignore_errors=True)
        copy(root / name, kept / name)
        told.append((name, "copied" + abroad(run.config)))
    record = to / "studies" / study.resolve().name / "study.json"
    if older := _read_record(record):
        content = joined(content, older, [run for run in older["runs"] if _is_other(kept / run, compared)])
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return told


def joined(record: dict[str, Any], older: dict[str, Any], runs: Iterable[str]) -> dict[str, Any]:
    """Return a study's record with what an older one says of other layers; trials that none names would pass for runs.

    Args:
        record: the new one.
        older: the one before.
        runs: those of the older one that are of layers which the new one lacks.
    """
    layers, named = {layer["layer"] for layer in record["layers"]}, set(names(record))
    return record | {
        "layers": [*record["layers"], *(layer for layer in older["layers"] if layer["layer"] not in layers)],
        "runs": [*record["runs"], *(run for run in runs if run not in named)],
        "smoke": [*record["smoke"], *(run for run in older.get("smoke") or [] if run not in named)],
    }


def _read_record(path: Path) -> dict[str, Any] | None:
    """Return a study's record; None where there is none, or a damaged one."""
    try:
        StudyRecord.read(path)
    except ValueError:
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def _is_other(folder: Path, layers: Set[str]) -> bool:
    """Return whether a folder holds a run of another layer than those."""
    try:
        return layer_identity(read(folder)) not in layers
    except RunError:
        return False


def holds(folder: Path, run: Run) -> bool:
    """Return whether a folder has the numbers of that run; one that is damaged has not."""
    try:
        return read(folder).record() == run.record()
    except RunError:
        return False


def names(record: dict[str, Any]) -> Iterator[str]:
    """Yield ``corpus/folder`` of every run that a study's record names, each once."""
    trials = [trial["run"] for layer in record["layers"] for trial in layer["search"]]
    yield from dict.fromkeys([*trials, *record["runs"], *record["smoke"]])


def abroad(config: dict[str, Any]) -> str:
    """Return a warning where a configuration names places of one machine."""
    places = [str(value) for part in ("data", "run") for value in config[part].values() if str(value).startswith("/")]
    return f"; its configuration names {', '.join(places)}, which other machines lack" if places else ""


def main() -> None:
    """Read the command line, copy, tell."""
    parser = argparse.ArgumentParser(prog="experiments.ship", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("study", type=Path, nargs="+", help="folder with study.json")
    parser.add_argument("--to", type=Path, default=RESULTS, help=f"where to copy to; {RESULTS} unless given")
    words = parser.parse_args()
    with one_line_errors():
        for study in words.study:
            for name, what in ship(study, words.to):
                print(f"{name}: {what}")


if __name__ == "__main__":
    main()
