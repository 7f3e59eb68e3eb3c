"""Run a study, layers x seeds under one budget, and report on it: ``python -m experiments.compare study=quick``.

Each run is a process of its own, so that its peak memory is its own and its crash ends nothing else. What is finished
is not run again, neither here nor where the study says that finished runs are kept: the same command after a kill goes
on where it stopped. Every setting of ``experiments.train`` may follow and goes to every run, ``data=ptb
budget.seconds=600``. Runs go one after the other, or side by side through one of Hydra's launchers:
``hydra/launcher=joblib hydra.launcher.n_jobs=4``, ``hydra/launcher=submitit_slurm hydra.launcher.partition=...``.
"""

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments import report
from experiments.cli import CONFIGS, guarded, one_line_errors
from experiments.study import Job, Study


class Runner:
    """Executes the jobs of a study, whatever becomes of each.

    Attributes:
        failed: the jobs that ended without a result.
    """

    def __init__(self, study: Study, threads: int | None) -> None:
        self.study = study
        self.failed: list[Job] = []
        self._environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
        self._done = 0

    def __call__(self, jobs: Sequence[Job]) -> None:
        """Run one job after the other; the study's record is written anew after each."""
        for job in jobs:
            self._done += 1
            place = f"[{self._done}/{len(self.study)}] {job}"
            if source := job.fetch(self.study.finished):
                print(f"{place}: taken from {source}: {job.outcome}", flush=True)
                continue
            if outcome := job.outcome:
                print(f"{place}: done before: {outcome}", flush=True)
                continue
            print(f"{place}: training", flush=True)
            command = [sys.executable, "-m", "experiments.train", *job.words]
            # Its progress bar and its errors go to the terminal; what it prints at the end is printed here.
            done = subprocess.run(command, stdout=subprocess.DEVNULL, env=self._environment, check=False)
            outcome = job.outcome
            if outcome is None:
                self.failed.append(job)
            self.study.save()
            print(f"{place}: {outcome or f'failed with exit status {done.returncode}'}", flush=True)


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
        chosen = OmegaConf.to_container(config.study, resolve=True)
        hydra_config = HydraConfig.get()
        study = Study(chosen, settings(hydra_config.runtime.choices["study"], hydra_config.overrides.task))
        runner = Runner(study, chosen["threads"])
        study.conduct(runner, together=False)
        study.save()
        output = Path(config.run.root) / "compare" / study.preset
        jobs = [job for layer in study.layers for job in study.runs(layer, study.seeds)]
        record = [study.folder / "study.json"]
        comparison = report.write([job.folder for job in jobs], output, f"Study {study.preset}", record)
    print(f"\n{report.text_table(comparison)}\n")
    for name, reason in comparison.left_out:
        print(f"left out: {name}: {reason}")
    for layer in study.lost:
        print(f"no learning rate: {layer} diverged in every trial")
    for job in runner.failed:
        print(f"failed: {job}; alone: python -m experiments.train {' '.join(job.words)}")
    print(f"{report.answer(comparison)}\n{output / 'report.html'}")
    if runner.failed:
        sys.exit(1)


if __name__ == "__main__":
    guarded(main, "compare")
