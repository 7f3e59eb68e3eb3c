"""The runs of a study: which there are, at which learning rate, in which order, and the record that is kept of them.

A layer's learning rate is that of the optimiser times one of ``study.search.rates``: each is tried for a share of the
budget, and the one with the best validation is taken for all seeds. Every layer has the same trials. They move the rate
of the whole model: gradients that reach the backbone scale with the layer's objective as its own do.
"""

import dataclasses
import fnmatch
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose

from experiments import wording
from experiments.cli import CONFIGS, nearest, resolved
from experiments.reading import Run, RunError, read
from experiments.train import check, overspent, spent
from lvsoftmax.runs import build, folder_for, identity

KEPT = ("config.yaml", "environment.json", "metrics.jsonl", "result.json")
"""The files of a finished run that its numbers can be read from."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a study.

    Attributes:
        title: what it is, for people.
        layer: the output layer, and its settings where the study varies them.
        words: the command line of ``experiments.train``.
        config: what that command line means.
        identity: what decides its numbers.
        folder: where the run is kept.
    """

    title: str
    layer: str
    words: tuple[str, ...]
    config: dict[str, Any]
    identity: str
    folder: Path

    def __str__(self) -> str:
        return self.title

    @property
    def name(self) -> str:
        """The corpus' folder and the run's own."""
        return "/".join(self.folder.parts[-2:])

    @property
    def run(self) -> Run | None:
        """The run, once it is at the end of its budget or has diverged; else None."""
        return self.ended(self.folder)

    def ended(self, folder: Path) -> Run | None:
        """Return this job's run from a folder; None if there is none, or one of less or more than its budget."""
        try:
            run = read(folder)
        except RunError:
            return None
        budget = self.config["budget"]
        if run.result and (spent(budget, **run.result["train"]) < 1 or overspent(budget, **run.result["train"])):
            return None
        return run

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.config["optim"]["learning_rate"]

    @property
    def seconds(self) -> float | None:
        """How long the run trained, once it has ended."""
        run = self.run
        return run and (run.result["train"] if run.result else run.diverged)["seconds"]

    @property
    def outcome(self) -> str | None:
        """How the run ended, in words; None if it has yet to reach the end of its budget."""
        run = self.run
        if run is None:
            return None
        if run.diverged:
            return f"diverged at step {run.diverged['step']:,}; delete {self.folder} to run it again"
        return (
            f"test perplexity {wording.perplexity(run.result['test']['perplexity'])}, "
            f"{wording.duration(run.result['train']['seconds'])} of training"
        )

    def fetch(self, roots: Iterable[str]) -> Path | None:
        """Copy the run from the first of these roots where it has ended, and return that folder; None without one.

        A run that has begun here is left to go on.
        """
        if self.folder.exists():
            return None
        for root in roots:
            for found in sorted(Path(root).glob(f"*/*-{self.identity[:8]}")):
                run = self.ended(found)
                if run and run.environment.get("identity") == self.identity:
                    copy(found, self.folder)
                    return found
        return None


def copy(run: Path, to: Path) -> None:
    """Copy what a finished run's numbers can be read from; the copy appears whole or not at all."""
    part = to.with_name(f"{to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name in KEPT:
        if (run / name).exists():
            shutil.copyfile(run / name, part / name)
    part.replace(to)


class Study:
    """A study, planned: its runs are composed from here, and its record is written from here.

    Args:
        study: ``name``, ``layers`` (see :func:`expand`), ``seeds``, ``search`` (``rates``, ``budget``, ``seed``; or
            None: the optimiser's rate for every layer), ``smoke`` (``layers``, of which those that are not compared run
            for ``tokens``; or None), ``finished``: roots of folders whose runs need not be run again.
        words: settings for every run, as on the command line of ``experiments.train``.

    Raises:
        ValueError: the study is empty, names a layer that does not exist, or a setting does not fit.
    """

    def __init__(self, study: Mapping[str, Any], words: Sequence[str]) -> None:
        for field in ("layers", "seeds", "finished"):
            _must_be_list(f"study.{field}", study[field])
        self.preset = study["name"]
        self.words = tuple(words)
        self.layers = expand(study["layers"])
        self.seeds = list(dict.fromkeys(study["seeds"]))
        self.finished = study["finished"]
        if not self.seeds or not self.layers:
            raise ValueError(f"study {self.preset} is empty; fill study.layers and study.seeds")
        self.search = study["search"]
        if self.search:
            _must_be_list("study.search.rates", self.search["rates"])
            if not self.search["rates"] or not all(_positive(rate) for rate in self.search["rates"]):
                raise ValueError(f"study.search.rates={self.search['rates']}: must be factors above 0")
            if not (_positive(self.search["budget"]) and self.search["budget"] <= 1):
                raise ValueError(
                    f"study.search.budget={self.search['budget']}: must be a share of the budget, in (0, 1]"
                )
        compared = {layer.split()[0] for layer in self.layers}
        self.smoke = study["smoke"] or {"layers": [], "tokens": 1}
        _must_be_list("study.smoke.layers", self.smoke["layers"])
        self._smoked = [layer for layer in expand(self.smoke["layers"]) if layer.split()[0] not in compared]
        self._digests: dict[str, str] = {}
        self._jobs: dict[tuple[Any, ...], Job] = {}
        # Mistakes in any layer's settings shall be found now, not in the third hour.
        plain = [self.job(layer, self.seeds[0]) for layer in self.layers]
        self._check_trials(self.layers[0])
        self.smoke_runs()
        config = plain[0].config
        self.budget = config["budget"]
        self.data = config["name"]["data"]
        # A budget said on the command line is one of several: each has a record of its own.
        said = {word.partition("=")[0].removeprefix("budget.") for word in self.words if word.startswith("budget.")}
        limits = [f"{limit:g}-{key}" for key, limit in self.budget.items() if key in said and limit is not None]
        self.folder = Path(config["run"]["root"]) / "studies" / "-".join((self.preset, self.data, *limits))

    def __len__(self) -> int:
        """Return the number of runs, trials included."""
        trials = len(self.search["rates"]) if self.search else 0
        return len(self.layers) * (trials + len(self.seeds)) + len(self._smoked)

    def job(self, layer: str, seed: int, *words: str, note: str = "") -> Job:
        """Compose one run, inside a Hydra program; the same one is composed once."""
        key = (layer, seed, words, note)
        if key not in self._jobs:
            self._jobs[key] = self._composed(*key)
        return self._jobs[key]

    def _composed(self, layer: str, seed: int, words: tuple[str, ...], note: str) -> Job:
        name, *variant = layer.split()
        own = (*self.words, f"output={name}", *variant, f"seed={seed}", *words)
        composed = compose("train", list(own), return_hydra_config=True)
        config = resolved(composed, composed.hydra.runtime.choices)
        check(config)
        data = json.dumps(config["data"])
        if data not in self._digests:
            self._digests[data] = build(config["data"]).digest
        given = (config, self._digests[data])
        follows_budget = build(config["schedule"]).depends_on_budget
        return Job(
            f"{layer}, seed {seed}{note}", layer, own, config, identity(*given, follows_budget=follows_budget),
            folder_for(*given, follows_budget=follows_budget),
        )  # fmt: skip

    def trials(self, layer: str) -> list[Job]:
        """Return the runs that decide a layer's learning rate; none without a search."""
        if not self.search:
            return []
        seed, share = self.search["seed"], self.search["budget"]
        config = self.job(layer, seed).config
        budget = {key: limit * share for key, limit in config["budget"].items() if limit is not None}
        tokens = config["evaluate"]["tokens"]
        words = [
            *(f"budget.{key}={int(limit) if key == 'tokens' else f'{limit:.6g}'}" for key, limit in budget.items()),
            f"evaluate.final_tokens={'null' if tokens is None else tokens}",
        ]
        return [
            self.job(layer, seed, *words, *rate_words(config["optim"], factor), note=f", trial at rate x {factor:g}")
            for factor in self.search["rates"]
        ]

    def _check_trials(self, layer: str) -> None:
        """Raise ``ValueError`` where a trial would be the beginning of a run, and be gone once that has ended."""
        if not self.search or self.search["seed"] not in self.seeds:
            return
        optim = self.job(layer, self.search["seed"]).config["optim"]
        for trial, factor in zip(self.trials(layer), self.search["rates"], strict=True):
            if trial.identity == self.job(layer, self.search["seed"], *rate_words(optim, factor)).identity:
                raise ValueError(
                    "study.search: a trial and a run would share a folder, since neither schedule nor evaluation tells "
                    "them apart; set evaluate.tokens, a schedule that follows the budget, or another study.search.seed"
                )

    def runs(self, layer: str, seeds: Iterable[int]) -> list[Job]:
        """Return a layer's runs, at the learning rate that its trials say; none before those, or where all diverged."""
        if not self.search:
            return [self.job(layer, seed) for seed in seeds]
        best = choice(self.trials(layer))
        if best is None:
            return []
        words = rate_words(self.job(layer, self.search["seed"]).config["optim"], self.search["rates"][best])
        return [self.job(layer, seed, *words) for seed in seeds]

    def smoke_runs(self) -> list[Job]:
        """Return the runs that only show that a layer trains."""
        tokens = self.smoke["tokens"]
        few = max(tokens // 16, 1)  # their perplexity says nothing
        words = ("budget.epochs=null", "budget.seconds=null", f"budget.tokens={tokens}", f"evaluate.tokens={few}",
                 f"evaluate.final_tokens={few}")  # fmt: skip
        return [self.job(layer, self.seeds[0], *words, note=", smoke run") for layer in self._smoked]

    def conduct(self, execute: Callable[[list[Job]], None], *, together: bool) -> None:
        """Have every run of the study executed: trials before the runs that wait for them, smoke runs last.

        Args:
            execute: runs what of its jobs is not finished.
            together: hand over all that can run side by side. Otherwise seed by seed, a layer's trials right before its
                first run, so that a study cut short has something of everybody.
        """
        if together:
            execute([trial for layer in self.layers for trial in self.trials(layer)])
            execute([run for layer in self.layers for run in self.runs(layer, self.seeds)])
        else:
            for number, seed in enumerate(self.seeds):
                for layer in self.layers:
                    execute(self.trials(layer) if number == 0 else [])
                    execute(self.runs(layer, [seed]))
        execute(self.smoke_runs())

    def record(self) -> dict[str, Any]:
        """Return what there is of the study so far, runs by ``corpus/folder`` under the run root."""
        layers, runs = [], []
        for layer in self.layers:
            trials, own = self.trials(layer), self.runs(layer, self.seeds)
            best, tried = choice(trials), self.search["rates"] if self.search else []
            ended = zip(trials, valid_losses(trials), strict=True)
            layers.append({
                "layer": layer,
                "search": [
                    {"learning_rate": trial.rate, "valid_nll": loss, "seconds": trial.seconds, "run": trial.name}
                    for trial, loss in ended if trial.run
                ],
                "learning_rate": own[0].rate if own else None,
                "edge": best is not None and len(tried) > 1 and tried[best] in (min(tried), max(tried)),
            })  # fmt: skip
            runs += [job.name for job in own if job.run]
        smoke = [job.name for job in self.smoke_runs() if job.run]
        return {
            "study": self.preset, "data": self.data, "budget": self.budget, "seeds": self.seeds,
            "trial_budget": self.search and self.search["budget"], "layers": layers, "runs": runs, "smoke": smoke,
        }  # fmt: skip

    @property
    def lost(self) -> list[str]:
        """The layers that diverged at every learning rate that was tried."""
        tried = {layer: [trial.run for trial in self.trials(layer)] for layer in self.layers}
        return [layer for layer, runs in tried.items() if runs and all(run and run.diverged for run in runs)]

    def save(self) -> None:
        """Write the record to ``study.json`` in the study's folder, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / "study.json.part"
        part.write_text(json.dumps(self.record(), indent=1) + "\n", encoding="utf-8")
        part.replace(self.folder / "study.json")


def choice(trials: Sequence[Job]) -> int | None:
    """Return which trial has the best validation; None while one is not finished, and where all diverged."""
    runs = [trial.run for trial in trials]
    if not all(runs) or not any(run.result for run in runs if run):
        return None
    losses = [math.inf if loss is None else loss for loss in valid_losses(trials)]
    return losses.index(min(losses))


def valid_losses(trials: Sequence[Job]) -> list[float | None]:
    """Return the trials' validations in nats per token, None for those that diverged or are not finished.

    Where one of them gives some words no probability, all are compared smoothed, as infinite losses cannot be.
    """
    found = [trial.run.result["valid"] if trial.run and trial.run.result else None for trial in trials]
    smoothed = any(valid and valid.get("coverage", 1.0) < 1 for valid in found)
    return [valid and (math.log(valid["epsilon_perplexity"]) if smoothed else valid["nll"]) for valid in found]


def rate_words(optim: Mapping[str, Any], factor: float) -> list[str]:
    """Return the settings that multiply every learning rate of an optimiser."""
    names = [name for name in ("learning_rate", "output_learning_rate") if optim[name] is not None]
    return [f"optim.{name}={optim[name] * factor:.6g}" for name in names]


def expand(entries: Iterable[str]) -> list[str]:
    """Return the output layers that the entries of a study stand for, each once.

    An entry is the name of a file in ``configs/output`` or a pattern with ``*``, which may match none; settings may
    follow it, with commas between the values to try: ``sampled_softmax output.samples=64,256 output.noise=unigram``.

    Raises:
        ValueError: there is no layer of a given name, or a setting is none of an output layer.
    """
    there = sorted(file.stem for file in (CONFIGS / "output").glob("*.yaml"))
    layers: dict[str, None] = {}
    for entry in entries:
        pattern, *settings = entry.split()
        matches = fnmatch.filter(there, pattern)
        if not matches and "*" not in pattern:
            raise ValueError(f"study.layers={pattern}: no such output layer{nearest(pattern, there)}")
        choices = []
        for setting in settings:
            key, equals, values = setting.partition("=")
            if not equals or not key.startswith("output."):
                raise ValueError(
                    f"study.layers={entry}: {setting} is no setting of an output layer; write output.x=..."
                )
            choices.append([f"{key}={value}" for value in values.split(",")])
        layers |= {" ".join((name, *chosen)): None for name in matches for chosen in itertools.product(*choices)}
    return list(layers)


def _must_be_list(field: str, value: Any) -> None:
    if not isinstance(value, list):
        raise ValueError(f"{field}={value}: must be a list; write {field}=[{value}]")


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0
