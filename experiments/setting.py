"""Which runs are compared: those of one setting, its text, backbone and budget. Imports no torch."""

import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from experiments import wording
from experiments.reading import NOT_CONDITIONS, Run, RunError, differing, flat, read

NOT_SHARED = (*NOT_CONDITIONS, "name.", "data.", "device", "backend", "log_every", "checkpoint_every")
"""Settings that need not be alike in the seeds of a layer: names and the text, which is told by what it holds, and what
decides no numbers."""


@dataclasses.dataclass(frozen=True, order=True)
class Setting:
    """What runs must share to be compared.

    Attributes:
        data: the text, as its configuration is named.
        model: the backbone.
        budget: what ends a run: ``epochs``, ``tokens``, ``seconds``, those that are set.
        mark: what tells it from another setting of the same name, as where a text was made in two lengths.
    """

    data: str
    model: str
    budget: tuple[tuple[str, float], ...]
    mark: str = ""

    @classmethod
    def of(cls, run: Run) -> "Setting":
        """Return the setting of a run."""
        names, budget = run.config["name"], run.config["budget"]
        limits = sorted((key, value) for key, value in budget.items() if value is not None)
        return cls(names["data"], names.get("model", ""), tuple(limits))

    def __str__(self) -> str:
        text = f"{self.data}, {self.budget_in_words} each" if self.budget else self.data
        return f"{text} ({self.mark})" if self.mark else text

    @property
    def budget_in_words(self) -> str:
        """The budget for people."""
        forms = {"epochs": lambda n: f"{n:g} epoch{'s' if n != 1 else ''}", "seconds": wording.duration,
                 "tokens": lambda n: f"{wording.count(n)} tokens"}  # fmt: skip
        return " or ".join(forms.get(key, str)(value) for key, value in self.budget)

    @property
    def slug(self) -> str:
        """A name for files and anchors."""
        parts = [self.data, self.model, *(f"{value:.12g}-{key}" for key, value in self.budget), self.mark]
        return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")

    @property
    def in_time(self) -> bool:
        """Whether the budget is one of time, so that everybody trained equally long."""
        return [key for key, _ in self.budget] == ["seconds"]


def layer_identity(run: Run) -> str:
    """Return what tells an output layer from another: its name and all options that are set."""
    return json.dumps({name: value for name, value in options(run).items() if value is not None}, sort_keys=True)


def options(run: Run) -> dict[str, Any]:
    """Return the output layer's settings. Runs from before a layer had a choice of backends took what auto takes."""
    return {"backend": "auto"} | run.config["output"]


def gather(
    folders: Iterable[Path], aside: Mapping[str, str] | None = None, first: Iterable[str] = ()
) -> tuple[list[tuple[Setting, list[Run]]], list[tuple[str, str]]]:
    """Read the folders and leave out, by name and with the reason, what cannot be compared.

    Runs that share setting and text are compared. Where some compare layers, a setting or text of one is left out.

    Args:
        folders: of runs.
        aside: runs that take no part, by name, and why.
        first: names of runs that go before others of the same layer, and with them all under the same settings.

    Returns:
        Settings and their comparable runs; ``(folder, reason)`` of each one left out.
    """
    runs: list[Run] = []
    left_out: list[tuple[str, str]] = []
    for folder in sorted({Path(folder).resolve() for folder in folders}):
        name = "/".join(folder.parts[-2:])
        if aside and name in aside:
            left_out.append((name, aside[name]))
            continue
        try:
            runs.append(read(folder))
        except RunError as error:
            left_out.append((name, str(error)))
    preferred = set(first)
    runs.sort(key=lambda run: run.name not in preferred)
    settings: dict[Setting, list[Run]] = {}
    for run in runs:
        settings.setdefault(Setting.of(run), []).append(run)
    kept = [(setting, group) for setting in sorted(settings) for group in _by_text(settings[setting], left_out)]
    kept = [(setting, _once(group, preferred, left_out)) for setting, group in kept]
    if any(_layers(group) > 1 for _, group in kept):
        for setting, group in kept:
            if _layers(group) == 1:
                reason = f"nothing else was run on {setting}: there is nothing to compare it with"
                left_out += [(run.name, reason) for run in group]
        kept = [(setting, group) for setting, group in kept if _layers(group) > 1]
    return _marked(kept), sorted(left_out)


def _layers(runs: Iterable[Run]) -> int:
    return len({layer_identity(run) for run in runs})


def _by_text(runs: Sequence[Run], left_out: list[tuple[str, str]]) -> list[list[Run]]:
    """Part the runs of a setting by text; leave out a text on which one layer only was run, except the commonest."""
    texts = Counter(json.dumps(run.corpus) for run in [run for run in runs if run.result] or runs)
    common = texts.most_common(1)[0][0]
    groups: dict[str, list[Run]] = {common: []}
    for run in runs:  # one that diverged knows little of its text
        groups.setdefault(json.dumps(run.corpus) if run.result else common, []).append(run)
    for text in [text for text, group in groups.items() if text != common and _layers(group) == 1]:
        here = json.loads(common)
        for run in groups.pop(text):
            key = next(key for key, value in run.corpus.items() if here.get(key) != value)
            left_out.append((run.name, f"another corpus: its {key} is {run.corpus[key]}, here {here.get(key)}"))
    return list(groups.values())


def _once(runs: Sequence[Run], preferred: Set[str], left_out: list[tuple[str, str]]) -> list[Run]:
    """Keep one configuration of each layer, and of that the first run of each seed: means are of runs that are alike.

    The configuration is one of which a run is preferred, else the one with the most seeds, else the first.
    """
    layers: dict[str, dict[frozenset[tuple[str, str]], list[Run]]] = {}
    for run in runs:
        layers.setdefault(layer_identity(run), {}).setdefault(_configuration(run), []).append(run)
    kept: list[Run] = []
    for configurations in layers.values():
        (settings, chosen), *others = sorted(configurations.items(), key=lambda found: (
            not any(run.name in preferred for run in found[1]), -len({run.seed for run in found[1]})
        ))  # fmt: skip
        seeds: dict[int, Run] = {}
        for run in chosen:
            other = seeds.setdefault(run.seed, run)
            if other is not run:
                where = wording.listing(differing([other, run]) or ["nothing that matters"])
                left_out.append((run.name, f"same layer and seed as {other.name}, from which it differs in {where}"))
        for own, unlike in others:
            where = wording.listing(sorted({key for key, _ in own ^ settings}))
            reason = f"same layer as {chosen[0].name} under other settings: they differ in {where}"
            left_out += [(run.name, reason) for run in unlike]
        kept += seeds.values()
    return kept


def _configuration(run: Run) -> frozenset[tuple[str, str]]:
    """Return the settings in which the seeds of a layer are alike; what is null is as good as not there."""
    settings = flat(run.config).items()
    return frozenset((key, value) for key, value in settings if value != "null" and not key.startswith(NOT_SHARED))


def _marked(kept: Sequence[tuple[Setting, list[Run]]]) -> list[tuple[Setting, list[Run]]]:
    """Tell settings of the same name apart, by study where that does, else by number."""
    names = Counter(setting for setting, _ in kept)
    marked: list[tuple[Setting, list[Run]]] = []
    for setting, runs in kept:
        mark = ""
        if names[setting] > 1:
            studies = {str(run.config["name"].get("study") or "") for run in runs}
            mark = next(iter(studies)) if len(studies) == 1 else ""
        taken = {other for other, _ in marked}
        for number in itertools.count(1):
            own = dataclasses.replace(setting, mark=mark if number == 1 else f"{mark} {number}".strip())
            if own not in taken:
                break
        marked.append((own, runs))
    return marked
