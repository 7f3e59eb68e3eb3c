"""Training runs of seconds: their configuration, their command line, what they log; the overrides are a fixture."""

import os
import sys
from pathlib import Path

from experiments.cli import compose_config
from lvsoftmax import strict_json

TIME_FIELDS = ("seconds", "tokens_per_second", "output_share", "peak_bytes")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def config(overrides, *more):
    return compose_config("train", [*overrides, *more])


def metrics(folder):
    """The lines of ``metrics.jsonl`` without what the clock decides."""
    lines = [strict_json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIME_FIELDS} for line in lines]


def command(overrides, prelude=""):
    """The command line of a training, in a process of its own."""
    program = (
        f"{prelude}\nfrom experiments.train import main\nfrom experiments.cli import guarded\nguarded(main, 'train')"
    )
    return [sys.executable, "-c", program, *overrides]
