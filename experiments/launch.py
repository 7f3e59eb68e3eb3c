"""Several trainings through one of Hydra's launchers; :mod:`experiments.compare` calls it with a list that it wrote.

A sweep of Hydra is a product of choices, and the runs of a study are none: every layer has its own learning rate. So
the sweep is over places in a list of command lines, ``{"threads": 1, "jobs": [["output=full_softmax", ...], ...]}``:

``python -m experiments.launch -m hydra/launcher=joblib jobs=outputs/studies/quick-sotu/jobs-1a2b3c4d.json job=0,1,2``
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from experiments.cli import CONFIGS, guarded


def environment(threads: int | None) -> dict[str, str]:
    """Return the environment of a training with so many threads; None leaves the number to PyTorch."""
    return os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})


def command(words: list[str]) -> list[str]:
    """Return what runs a training as a process of its own."""
    return [sys.executable, "-m", "experiments.train", *words]


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="launch")
def main(config: DictConfig) -> None:
    """Run one of the list. What becomes of it stands in its folder; whoever made the list looks there."""
    listed = json.loads(Path(config.jobs).read_text(encoding="utf-8"))
    words = listed["jobs"][config.job]
    subprocess.run(
        command(words), stdout=subprocess.DEVNULL, env=environment(listed["threads"]), cwd=config.folder, check=False
    )


if __name__ == "__main__":
    guarded(main, "launch")
