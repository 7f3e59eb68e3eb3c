"""The record that a study keeps of itself, read: the search for learning rates, and which runs are what."""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments import wording
from experiments.reading import RunError, read
from lvsoftmax import strict_json


@dataclasses.dataclass(frozen=True)
class Trial:
    """One learning rate tried; ``loss`` is None where it diverged."""

    rate: float
    loss: float | None
    seconds: float | None
    run: str


@dataclasses.dataclass(frozen=True)
class Search:
    """The learning rates tried for one layer, and the one that was taken; None where all diverged."""

    layer: str
    trials: list[Trial]
    chosen: float | None

    @property
    def seconds(self) -> float:
        """What the search cost."""
        return math.fsum(trial.seconds or 0.0 for trial in self.trials)

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the largest or smallest tried, so that a better one may lie beyond."""
        rates = [trial.rate for trial in self.trials]
        return len(rates) > 1 and self.chosen in (min(rates), max(rates))


@dataclasses.dataclass(frozen=True)
class StudyRecord:
    """A file ``study.json``.

    Attributes:
        path: the file.
        name: of the study, with its text.
        searches: for learning rates, by layer; none without a search.
        runs: those that are compared, as ``text/folder``.
        smoke: runs that only show that a layer trains.
    """

    path: Path
    name: str
    searches: list[Search]
    runs: list[str]
    smoke: list[str]

    @classmethod
    def read(cls, path: Path) -> "StudyRecord":
        """Read a file.

        Raises:
            ValueError: it is damaged.
        """
        try:
            content: dict[str, Any] = strict_json.loads(path.read_text(encoding="utf-8"))
            searches = [
                Search(
                    layer["layer"],
                    [Trial(float(one["learning_rate"]), _loss(one["valid_nll"]), one.get("seconds"), one["run"])
                     for one in layer["search"]],
                    None if layer["learning_rate"] is None else float(layer["learning_rate"]),
                )
                for layer in content["layers"] if layer.get("search")
            ]  # fmt: skip
            name = " on ".join(filter(None, [content["study"], content.get("data")]))
            record = cls(path, name, searches, list(content["runs"]), list(content.get("smoke") or []))
            _ = record.seconds
        except (OSError, KeyError, TypeError, ValueError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"damaged: no record of a study ({' '.join(str(error).split())})") from error
        return record

    @classmethod
    def read_all(cls, paths: Iterable[Path]) -> tuple[list["StudyRecord"], list[tuple[str, str]]]:
        """Read files; return those that can be read, and name and reason of those that cannot."""
        records, left_out = [], []
        for path in sorted(set(map(Path, paths))):
            try:
                records.append(cls.read(path))
            except ValueError as error:
                left_out.append(("/".join(path.resolve().parts[-2:]), str(error)))
        return records, left_out

    @property
    def seconds(self) -> float:
        """What the search cost, all layers together."""
        return math.fsum(search.seconds for search in self.searches)

    @property
    def aside(self) -> dict[str, str]:
        """Runs that are no part of the comparison, and why."""
        compared = set(self.runs)
        trials = {trial.run: f"a trial in the search for a learning rate of study {self.name}"
                  for search in self.searches for trial in search.trials if trial.run not in compared}  # fmt: skip
        return trials | {run: f"a smoke run of study {self.name}" for run in self.smoke}

    def folders(self, runs: Sequence[str]) -> list[Path]:
        """Return where runs lie, of those that lie where the study wrote them or beside it under ``runs``."""
        root = self.path.resolve().parent.parent.parent
        return [folder for run in runs for folder in (root / run, root / "runs" / run) if folder.is_dir()]

    def smoke_outcomes(self) -> dict[str, str]:
        """Say how each smoke run ended."""
        outcomes = {}
        for name in self.smoke:
            outcomes[name] = "trained"
            for folder in self.folders([name]):
                try:
                    run = read(folder)
                except RunError as error:
                    outcomes[name] = str(error)
                    continue
                steps = run.result["train"]["steps"] if run.result else run.diverged["step"]
                layer = run.layer.replace("_", " ")
                if run.result:
                    speed = wording.whole(run.result["train"]["tokens_per_second"])
                    outcomes[name] = f"{layer}: {steps:,} steps without error, at {speed} tokens/s"
                else:
                    outcomes[name] = f"{layer}: diverged at step {steps:,}"
        return outcomes


def _loss(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
