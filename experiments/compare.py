"""Run a study, layers x seeds under one budget, and report on it: ``python -m experiments.compare study=quick``.

Each run is a process of its own, so that its peak memory is its own and its crash ends nothing else. What is finished
is not run again: the same command after a kill goes on where it stopped. Every setting of ``experiments.train`` may
follow and goes to every run, ``data=ptb data.path=... budget.tokens=2000000``.
"""

import dataclasses
import fnmatch
import itertools
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments import report, wording
from experiments.cli import CONFIGS, guarded, nearest, one_line_errors, resolved
from experiments.comparison import RunError, read
from experiments.train import check, spent
from lvsoftmax.runs import build, folder_for


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a study.

    Attributes:
        layer: the output layer, and its settings where the study varies them.
        seed: the seed.
        words: the command line of ``experiments.train``.
        config: what that command line means.
        folder: where the run is kept.
    """

    layer: str
    seed: int
    words: tuple[str, ...]
    config: dict[str, Any]
    folder: Path

    def __str__(self) -> str:
        return f"{self.layer}, seed {self.seed}"

    @property
    def outcome(self) -> str | None:
        """How the run ended, in words; None if it has yet to reach the end of its budget."""
        try:
            run = read(self.folder)
        except RunError:
            return None
        if run.diverged:
            return f"diverged at step {run.diverged['step']:,}; delete {self.folder} to run it again"
        if spent(self.config["budget"], **run.result["train"]) < 1:
            return None
        return (
            f"test perplexity {wording.perplexity(run.result['test']['perplexity'])}, "
            f"{wording.duration(run.result['train']['seconds'])} of training"
        )


def plan(study: Mapping[str, Any], words: Sequence[str]) -> list[Job]:
    """Return the runs of a study, seed by seed, all composed (inside a Hydra program) before the first of them starts.

    Args:
        study: ``layers``, see :func:`expand`, and ``seeds``.
        words: settings for every run, as on the command line.

    Raises:
        ValueError: the study is empty, names a layer that does not exist, or a setting does not fit.
    """
    for field in ("layers", "seeds"):
        if not isinstance(study[field], list):
            raise ValueError(f"study.{field}={study[field]}: must be a list; write study.{field}=[{study[field]}]")
    seeds = list(dict.fromkeys(study["seeds"]))
    layers = expand(study["layers"])
    if not seeds or not layers:
        raise ValueError(f"study {study['name']} is empty; fill study.layers and study.seeds")
    jobs = []
    digests: dict[str, str] = {}
    for seed in seeds:
        for layer in layers:
            name, *variant = layer.split()
            own = (*words, f"output={name}", *variant, f"seed={seed}")
            composed = compose("train", list(own), return_hydra_config=True)
            config = resolved(composed, composed.hydra.runtime.choices)
            check(config)
            data = json.dumps(config["data"])
            if data not in digests:
                digests[data] = build(config["data"]).digest
            follows_budget = build(config["schedule"]).depends_on_budget
            jobs.append(Job(layer, seed, own, config, folder_for(config, digests[data], follows_budget=follows_budget)))
    return jobs


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


def run(jobs: Sequence[Job]) -> list[Job]:
    """Run one job after the other, whatever becomes of each, and return those that failed."""
    failed = []
    for number, job in enumerate(jobs, 1):
        place = f"[{number}/{len(jobs)}] {job}"
        if outcome := job.outcome:
            print(f"{place}: done before: {outcome}", flush=True)
            continue
        print(f"{place}: training", flush=True)
        command = [sys.executable, "-m", "experiments.train", *job.words]
        # Its progress bar and its errors go to the terminal; what it prints at the end is printed here.
        status = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
        outcome = job.outcome
        if outcome is None:
            failed.append(job)
        print(f"{place}: {outcome or f'failed with exit status {status}'}", flush=True)
    return failed


def settings(study: str, words: Iterable[str]) -> list[str]:
    """Return the part of a command line that goes to every run: all but the study's own lists.

    Raises:
        ValueError: a setting that is not the same for every run.
    """
    lists = {"output": "use study.layers=[...]", "seed": "use study.seeds=[...]", "run.dir": "set run.root instead"}
    kept = [f"study={study}"]
    for word in words:
        key = word.lstrip("+~").split("=")[0]
        if key in lists:
            raise ValueError(f"{word}: the runs of a study differ in it; {lists[key]}")
        if key != "study" and not key.startswith("study."):
            kept.append(word)
    return kept


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="compare")
def main(config: DictConfig) -> None:
    """Plan, run, report."""
    with one_line_errors():
        study = OmegaConf.to_container(config.study, resolve=True)
        hydra_config = HydraConfig.get()
        jobs = plan(study, settings(hydra_config.runtime.choices["study"], hydra_config.overrides.task))
        failed = run(jobs)
        output = Path(config.run.root) / "compare" / study["name"]
        comparison = report.write([job.folder for job in jobs], output, f"Study {study['name']}")
    print(f"\n{report.text_table(comparison)}\n")
    for name, reason in comparison.left_out:
        print(f"left out: {name}: {reason}")
    for job in failed:
        print(f"failed: {job}; alone: python -m experiments.train {' '.join(job.words)}")
    print(f"{report.answer(comparison)}\n{output / 'report.html'}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    guarded(main, "compare")
