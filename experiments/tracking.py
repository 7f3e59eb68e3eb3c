"""What a run tells wandb: a mirror of ``metrics.jsonl``, which stays the truth."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Tracker:
    """Logs to wandb inside the run's folder; offline by default, so that it needs no account and no network.

    A failure of wandb is reported once and never ends a run. With ``mode=disabled`` wandb is not imported.

    Args:
        folder: the run's folder; wandb's own files go to its subfolder ``wandb``.
        config: the run's resolved configuration.
        run_id: the run's id, of one to go on with or of a new one.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], run_id: str) -> None:
        self._run = None
        if config["wandb"]["mode"] == "disabled":
            return
        # Where wandb goes online, its own settings say to which server.
        kept = ("DIR", "CACHE_DIR", "DATA_DIR", *(("CONFIG_DIR",) if config["wandb"]["mode"] == "offline" else ()))
        for name in kept:
            os.environ[f"WANDB_{name}"] = str(folder.absolute())
        with self._reporting():
            import wandb

            self._run = wandb.init(
                project=config["wandb"]["project"],
                group=config["wandb"]["group"],
                mode=config["wandb"]["mode"],
                name=folder.name,
                id=run_id,
                resume="allow",
                dir=str(folder.absolute()),
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log numbers at a step; nested mappings and bands become slashed names."""
        if self._run is not None:
            with self._reporting():
                self._run.log(flatten(values), step=step)

    def finish(self, summary: Mapping[str, Any] | None = None) -> None:
        """Write the summary and close the run."""
        if self._run is not None:
            with self._reporting():
                self._run.summary.update(flatten(summary or {}))
                self._run.finish()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._run = None
            print(f"wandb failed and is left out from here on: {error}", file=sys.stderr)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"valid/nll": ...}`` from nested mappings; frequency bands are named by their first and last rank."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        elif key == "bands":
            flat |= {f"{prefix}band/{band['first']}-{band['last']}": band["nll"] for band in value}
        elif value is not None:
            flat[prefix + key] = value
    return flat
