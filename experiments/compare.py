"""Run a study, layers x seeds under one budget, and report on it: ``python -m experiments.compare study=quick``.

Each run is a process of its own, so that its peak memory is its own and its crash ends nothing else. What is finished
is not run again, neither here nor where the study says that finished runs are kept: the same command after a kill goes
on where it stopped. Every setting of ``experiments.train`` may follow and goes to every run, ``data=ptb
budget.seconds=600``. Runs go one after the other, or side by side through one of Hydra's launchers:
``hydra/launcher=joblib hydra.launcher.n_jobs=4``, ``hydra/launcher=submitit_slurm hydra.launcher.partition=...``.
"""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments import report
from experiments.cli import CONFIGS, guarded, one_line_errors
from experiments.launch import command, environment
from experiments.study import Job, Study


class Runner:
    """Executes the jobs of a study, whatever becomes of each.

    Args:
        study: whose record is written anew after each run.
        threads: of each run; None leaves the number to PyTorch.
        launcher: settings of the Hydra launcher that runs jobs side by side; empty: one after the other.

    Attributes:
        failed: the jobs that ended without a result.
    """

    def __init__(self, study: Study, threads: int | None, launcher: Sequence[str] = ()) -> None:
        self.study, self.threads, self.launcher = study, threads, launcher
        self.failed: list[Job] = []
        self._places: dict[Path, str] = {}

    def __call__(self, jobs: Sequence[Job]) -> None:
        """Run those of the jobs that are not finished."""
        pending = [job for job in jobs if not self._finished(job)]
        if self.launcher and pending:
            self._launch(pending)
        else:
            for job in pending:
                self._say(job, "training")
                # Its progress bar and its errors go to the terminal; what it prints at the end is printed here.
                done = subprocess.run(
                    command(job.words), stdout=subprocess.DEVNULL, env=environment(self.threads), check=False
                )
                self._ended(job, f"failed with exit status {done.returncode}")

    def _finished(self, job: Job) -> bool:
        self._places[job.folder] = f"[{len(self._places) + 1}/{len(self.study)}]"
        source = job.fetch(self.study.finished)
        if outcome := job.outcome:
            where = f" ({job.run.machine})" if source and job.run and job.run.machine else ""
            self._say(job, f"taken from {source}{where}: {outcome}" if source else f"done before: {outcome}")
        return outcome is not None

    def _launch(self, jobs: Sequence[Job]) -> None:
        self.study.folder.mkdir(parents=True, exist_ok=True)
        jobs_as_text = json.dumps({"threads": self.threads, "jobs": [job.words for job in jobs]}, indent=1)
        # Jobs of an earlier launch may still wait in a queue and read their list later: each list has its own file.
        listed = self.study.folder / f"jobs-{hashlib.sha256(jobs_as_text.encode()).hexdigest()[:8]}.json"
        listed.write_text(jobs_as_text)
        for job in jobs:
            self._say(job, "launched")
        numbers = ",".join(map(str, range(len(jobs))))
        words = [*self.launcher, f"jobs={listed.absolute()}", f"job={numbers}", f"folder={Path.cwd()}"]
        process = subprocess.Popen([sys.executable, "-m", "experiments.launch", "-m", *words])
        waiting = list(jobs)
        try:
            while waiting and process.poll() is None:
                time.sleep(1)
                for job in [job for job in waiting if job.outcome]:
                    waiting.remove(job)
                    self._ended(job)
            process.wait()
        finally:
            process.terminate()
        for job in waiting:
            self._ended(job, f"failed; the launcher's exit status is {process.returncode}")

    def _ended(self, job: Job, failure: str = "") -> None:
        outcome = job.outcome
        if outcome is None:
            self.failed.append(job)
        self.study.save()
        self._say(job, outcome or failure)

    def _say(self, job: Job, text: str) -> None:
        print(f"{self._places[job.folder]} {job}: {text}", flush=True)


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
        launcher = [
            word for word in hydra_config.overrides.hydra if word.startswith(("hydra/launcher", "hydra.launcher"))
        ]
        runner = Runner(study, chosen["threads"], launcher)
        study.conduct(runner, together=bool(launcher))
        study.save()
        output = Path(config.run.root) / "compare" / study.folder.name
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
