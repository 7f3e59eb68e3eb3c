"""One run folder, read: what it holds, checked as far as a page about it needs.

Imports no torch.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lvsoftmax import strict_json

NOT_CONDITIONS = ("output.", "name.output", "name.study", "seed", "run.", "wandb.", "study", "progress", "data.cache")
"""Settings that are no condition of a comparison: what is compared, where it is written and who watches."""

NOT_ENVIRONMENT = ("command", "identity", "backend", "wandb_id")
"""The same of the environment."""

NEEDED = ("layer", "seed", "train_steps", "train_tokens", "train_seconds")
"""Columns of a run's record that diverged runs have, too."""

OLDER_RUNS_LACK = ("coverage", "epsilon_perplexity", "output_flops_per_token")
"""Ends of columns that came later."""

POSITIVE = ("perplexity", "tokens_per_second")
"""Ends of columns of which logarithms are taken."""

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""LibYAML's, where PyYAML was built with it: a page about hundreds of runs shall not wait for their configurations."""


class RunError(ValueError):
    """A run folder that cannot take part in a comparison; the message says why."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run folder, read.

    Attributes:
        folder: where it lies.
        config: the resolved configuration.
        environment: revision, versions, machine.
        curve: the validations, in training order: ``step tokens seconds perplexity ...`` each.
        result: ``result.json``; None for a run that diverged.
        diverged: ``step tokens seconds`` at the end of a run that diverged; None otherwise.
    """

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    curve: tuple[dict[str, Any], ...]
    result: dict[str, Any] | None
    diverged: dict[str, Any] | None

    @property
    def name(self) -> str:
        """The corpus' folder and the run's own."""
        return "/".join(self.folder.resolve().parts[-2:])

    @property
    def layer(self) -> str:
        """The name of the output layer's configuration."""
        return self.config["name"]["output"]

    @property
    def seed(self) -> int:
        """The seed of backbone, batches and dropout."""
        return self.config["seed"]

    @property
    def corpus(self) -> dict[str, Any]:
        """What identifies the text; runs are comparable where they agree on everything that both know."""
        known = {"name": self.config["name"]["data"]}
        if self.result:
            known["vocabulary"] = self.result["vocabulary"]
            known |= {f"number of {part} tokens": self.result[part]["tokens"] for part in ("valid", "test")}
            known["unigram perplexity"] = round(self.result["test"]["unigram_perplexity"], 3)
        return known

    @property
    def flops(self) -> float | None:
        """Counted operations of the output layer in a training step, per token; older runs have none."""
        return self.result["train"].get("output_flops_per_token") if self.result else None

    @property
    def samples(self) -> int | None:
        """How many words the output layer draws, whether its setting is a number or a share; None if it draws none."""
        samples = self.config["output"].get("samples")
        if not isinstance(samples, int | float) or not self.result:
            return None
        if isinstance(samples, int):
            return samples
        return max(math.ceil(round(samples * self.result["vocabulary"], 6)), 1)  # as lvsoftmax.ops.noise.sample_count

    @property
    def perplexity(self) -> float:
        """Test perplexity; smoothed where words have no probability, since an infinite one says nothing."""
        test = self.result["test"]
        return test.get("epsilon_perplexity", math.inf) if self.lacks_words else test["perplexity"]

    @property
    def machine(self) -> str:
        """Where it ran: processor or device, and threads."""
        environment = self.environment
        device = environment.get("device", "")
        where = environment.get("processor", "") if device in ("cpu", "") else device
        threads = environment.get("threads")
        return f"{where}, {threads} thread{'s' if threads != 1 else ''}" if where and threads else where

    @property
    def revision(self) -> str:
        """The code it ran with, shortened; with a plus where there were changes on top."""
        environment = self.environment
        return f"{environment.get('revision') or ''}"[:10] + ("+" if environment.get("dirty") else "")

    @property
    def lacks_words(self) -> bool:
        """Whether the text has words to which the model gives the probability zero, and so infinite perplexity."""
        return bool(self.result) and self.result["test"].get("coverage", 1.0) < 1

    def record(self) -> dict[str, Any]:
        """Return the run as one unrounded line of a table; None for what a diverged run has not."""
        result, last = self.result, self.diverged
        line: dict[str, Any] = {"layer": self.layer, "seed": self.seed, "status": "finished" if result else "diverged"}
        for part in ("valid", "test"):
            for name in ("perplexity", "nll", "tokens", "unigram_perplexity"):
                line[f"{part}_{name}"] = result[part][name] if result else None
            for name in ("coverage", "epsilon_perplexity"):  # older runs have none
                line[f"{part}_{name}"] = result[part].get(name) if result else None
        line["train_steps"] = result["train"]["steps"] if result else last["step"]
        for name in ("tokens", "seconds"):
            line[f"train_{name}"] = result["train"][name] if result else last[name]
        for name in ("epochs", "tokens_per_second", "output_share"):
            line[f"train_{name}"] = result["train"][name] if result else None
        line["output_flops_per_token"] = self.flops
        line["peak_bytes"] = result["memory"]["peak_bytes"] if result else None
        for name in ("total", "output", "embedding", "backbone"):
            line[f"parameters_{name}"] = result["parameters"][name] if result else None
        return line | {"vocabulary": result["vocabulary"] if result else None, "folder": self.name}


def read(folder: Path) -> Run:
    """Read one run folder.

    Raises:
        RunError: it is no run folder, or its run is unfinished or damaged.
    """
    if not (folder / "config.yaml").is_file():
        raise RunError("no run folder: it holds no config.yaml")
    try:
        config = yaml.load((folder / "config.yaml").read_text(encoding="utf-8"), LOADER)
        environment = _json(folder / "environment.json") if (folder / "environment.json").exists() else {}
        # Most lines are of training, of which nothing is shown: only what is used has its numbers looked through.
        lines = [
            strict_json.loads(line) if parsed["kind"] != "train" else parsed
            for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            for parsed in (json.loads(line),)
        ]
        diverged = lines[-1] if lines and lines[-1]["kind"] == "diverged" else None
        if not diverged and not (folder / "result.json").exists():
            raise RunError(f"not finished: its last record is of step {lines[-1]['step'] if lines else 0:,}")
        result = None if diverged else _json(folder / "result.json")
        if result and any(predicts_nothing(result[part]) for part in ("valid", "test")):
            # The loss never overflowed, as a training must to be stopped, but what came out predicts nothing.
            train, result = result["train"], None
            diverged = {"step": train["steps"], "tokens": train["tokens"], "seconds": train["seconds"]}
        # An infinite validation cannot be drawn.
        curve = tuple(line for line in lines if line["kind"] == "valid" and 0 < line["perplexity"] < math.inf)
        run = Run(folder, config, environment, curve, result, diverged)
        _check(run)
    except RunError:
        raise
    except FileNotFoundError as error:
        raise RunError(f"not finished: it holds no {Path(error.filename).name}") from None
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise RunError(f"damaged: a field is missing or of the wrong kind ({error})") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"damaged: {' '.join(str(error).split())}") from None
    return run


def predicts_nothing(figures: dict[str, Any]) -> bool:
    """Return whether a perplexity is none, or infinite although every word of the text has a probability."""
    perplexity = figures["perplexity"]
    return math.isnan(perplexity) or (math.isinf(perplexity) and figures.get("coverage", 1.0) == 1)


def _json(file: Path) -> dict[str, Any]:
    content = strict_json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise RunError(f"damaged: {file.name} holds no JSON object")
    return content


def _check(run: Run) -> None:
    """Fail on any field the page needs now, while the folder can still be left out."""
    for column, value in run.record().items():
        needed = column in NEEDED or (run.result and not column.endswith(OLDER_RUNS_LACK))
        if value is None and not needed:
            continue
        words = column in ("layer", "status", "folder")
        if not isinstance(value, str if words else int | float) or (column.endswith(POSITIVE) and value <= 0):
            raise RunError(f"damaged: {column} is {value!r}")
    for part in ("valid", "test") if run.result else ():
        loss, perplexity = (run.result[part][name] for name in ("nll", "perplexity"))
        if math.isfinite(perplexity) and not math.isclose(loss, math.log(perplexity), abs_tol=1e-3):
            raise RunError(f"damaged: a {part} perplexity of {perplexity:.6g} is not that of a loss of {loss:.6g} nats")
    setting = {f"name.{name}": (run.config["name"].get(name, ""), str) for name in ("data", "model")}
    setting |= {f"budget.{name}": (limit, int | float | None) for name, limit in run.config["budget"].items()}
    for name, (value, kind) in setting.items():
        if not isinstance(value, kind):
            raise RunError(f"damaged: {name} is {value!r}")
    _ = (run.samples, run.machine, run.revision, run.config["output"].items())
    for point in run.curve:
        _ = point["tokens"] + point["seconds"] + point["perplexity"]
    for band in run.result["test"]["bands"] if run.result else ():
        _ = band["first"] + band["last"] + band["tokens"] + (band["nll"] or 0)
    _ = run.corpus


def flat(tree: Any, prefix: str = "") -> dict[str, str]:
    """Name every leaf by its path; lists are leaves."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree if isinstance(tree, str) else json.dumps(tree)}
    return {key: value for name, child in tree.items() for key, value in flat(child, f"{prefix}{name}.").items()}


def conditions(run: Run) -> dict[str, str]:
    """Return the settings and the surroundings under which a run was made, by dotted name."""
    settings = {key: value for key, value in flat(run.config).items() if not key.startswith(NOT_CONDITIONS)}
    machine = {key: value for key, value in flat(run.environment).items() if not key.startswith(NOT_ENVIRONMENT)}
    return settings | machine


def differing(runs: Sequence[Run]) -> list[str]:
    """Name the conditions in which the runs are not alike."""
    each = [conditions(run) for run in runs]
    keys = sorted(set(itertools.chain.from_iterable(each)))
    return [key for key in keys if len({conditions.get(key) for conditions in each}) > 1]
