"""Run folders, read and made comparable: which runs take part, and every number that is told about them.

Imports no torch.
"""

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from experiments import wording
from lvsoftmax import strict_json

REFERENCE = "full_softmax"
"""The output layer that the others are measured against."""

NOT_CONDITIONS = ("output.", "name.output", "name.study", "seed", "run.", "wandb.", "study", "progress", "data.cache")
"""Settings that are no condition of a comparison: what is compared, where it is written and who watches."""

NOT_ENVIRONMENT = ("command", "identity", "backend")
"""The same of the environment."""


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
        config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=True)
        environment = _json(folder / "environment.json") if (folder / "environment.json").exists() else {}
        lines = [
            strict_json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
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
    except (OSError, ValueError, OmegaConfBaseException, YAMLError) as error:
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
        words = column in ("layer", "status", "folder")
        if not isinstance(value, str if words else int | float | None):
            raise RunError(f"damaged: {column} is {value!r}")
    for point in run.curve:
        _ = point["tokens"] + point["seconds"] + point["perplexity"]
    for band in run.result["test"]["bands"] if run.result else ():
        _ = band["first"] + band["last"] + band["tokens"] + (band["nll"] or 0)
    _ = run.corpus


# -- which runs are compared ----------------------------------------------------------------------------------------


def gather(folders: Iterable[Path]) -> tuple[list[Run], list[tuple[str, str]]]:
    """Read the folders and leave out, by name and with the reason, what cannot be compared.

    The corpus that most finished runs share is the one compared; of several, that of the first folder.

    Returns:
        The comparable runs in the order of their folders, and ``(folder, reason)`` of each one left out.
    """
    runs: list[Run] = []
    left_out: list[tuple[str, str]] = []
    for folder in sorted(set(map(Path, folders))):
        try:
            runs.append(read(folder))
        except RunError as error:
            left_out.append(("/".join(folder.resolve().parts[-2:]), str(error)))
    corpora = Counter(json.dumps(run.corpus) for run in [run for run in runs if run.result] or runs)
    common = json.loads(corpora.most_common(1)[0][0]) if corpora else {}
    kept: dict[tuple[str, int], Run] = {}
    for run in runs:
        foreign = [key for key, value in run.corpus.items() if common.get(key, value) != value]
        identity = (json.dumps(run.config["output"], sort_keys=True), run.seed)
        if foreign:
            key = foreign[0]
            left_out.append((run.name, f"another corpus: its {key} is {run.corpus[key]}, here {common[key]}"))
        elif identity in kept:
            other = kept[identity]
            where = wording.listing(differing([other, run]) or ["nothing that matters"])
            left_out.append((run.name, f"same layer and seed as {other.name}, from which it differs in {where}"))
        else:
            kept[identity] = run
    return list(kept.values()), sorted(left_out)


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


# -- what is said about them ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Spread:
    """A number over seeds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Spread | None":
        """Summarise the values that are there; None when none is."""
        present = [value for value in values if value is not None and not math.isnan(value)]
        return cls(math.fsum(present) / len(present), min(present), max(present)) if present else None


@dataclasses.dataclass(frozen=True)
class Stop:
    """Where the first of the finished runs ended, on the axis that their budget left free: the point to compare at.

    Attributes:
        axis: ``"seconds"`` where the budget was in tokens or epochs, ``"tokens"`` where it was in seconds.
        value: how many of them.
    """

    axis: str
    value: float

    @classmethod
    def of(cls, runs: Iterable[Run]) -> "Stop | None":
        """Find the axis on which the runs ended furthest apart."""
        ends = [run.curve[-1] for run in runs if run.result and run.curve]
        if not ends:
            return None
        lowest = {axis: min(end[axis] for end in ends) for axis in ("seconds", "tokens")}
        axis = max(lowest, key=lambda axis: max(end[axis] for end in ends) / (lowest[axis] or 1))
        return cls(axis, lowest[axis])

    def __str__(self) -> str:
        return wording.duration(self.value) if self.axis == "seconds" else f"{wording.count(self.value)} tokens"


def perplexity_at(curve: Sequence[dict[str, Any]], stop: Stop) -> float | None:
    """Return the validation perplexity at a time or a number of tokens; None outside of the curve.

    Between two validations the mean loss is taken to fall linearly.
    """
    axis, value = stop.axis, stop.value
    for left, right in itertools.pairwise(curve):
        if left[axis] <= value <= right[axis]:
            width = right[axis] - left[axis]
            part = (value - left[axis]) / width if width else 1.0
            return math.exp((1 - part) * math.log(left["perplexity"]) + part * math.log(right["perplexity"]))
    return next((point["perplexity"] for point in curve if point[axis] == value), None)


@dataclasses.dataclass(frozen=True)
class Column:
    """A number of a finished run.

    Attributes:
        heading: its name.
        explanation: what it is, in a line.
        show: its form for people.
        value: reads it off a run.
        against: makes it relative: from a run's value and that of the reference at the same seed.
        best: ``min`` or ``max``, where one end is the better one.
    """

    heading: str
    explanation: str
    show: Callable[[float], str]
    value: Callable[[Run], float | None]
    against: Callable[[float, float], float] | None = None
    best: Callable[[Iterable[float]], float] | None = None

    def over(self, runs: Sequence[Run], reference: Sequence[Run]) -> Spread | None:
        """Summarise the finished ones of ``runs``; a relative number over the seeds that the reference has too."""
        finished = [run for run in runs if run.result]
        if self.against is None:
            return Spread.of(self.value(run) for run in finished)
        full = {run.seed: self.value(run) for run in reference if run.result}
        return Spread.of(self.against(self.value(run), full[run.seed]) for run in finished if run.seed in full)


def columns(stop: Stop | None, *, smoothed: bool) -> dict[str, Column]:
    """Return the columns of the main table, with what infinite perplexities are compared by where ``smoothed``."""
    found = {
        "test": Column(
            "Test perplexity", "exp of the exact mean negative log-likelihood of the test text", wording.perplexity,
            lambda run: run.result["test"]["perplexity"], best=min,
        ),
        "smoothed": Column(
            "Smoothed perplexity", "the same when 1 % of all probability is shared equally by the words, so that none "
            "has probability zero (Martins et al. 2020)", wording.perplexity,
            lambda run: run.result["test"].get("epsilon_perplexity"), best=min,
        ),
        "coverage": Column(
            "Coverage", "share of the test tokens whose probability is above zero", wording.most,
            lambda run: run.result["test"].get("coverage"),
        ),
        "difference": Column(
            "Above full softmax", "difference in test perplexity, paired by seed", wording.percent,
            lambda run: run.result["test"]["perplexity"], against=lambda own, full: own / full - 1,
        ),
        "valid": Column(
            "Validation perplexity", "on the whole validation text, at the end of training", wording.perplexity,
            lambda run: run.result["valid"]["perplexity"], best=min,
        ),
        "at_stop": Column(
            f"Validation after {stop}", "validation perplexity when the first run ended", wording.perplexity,
            lambda run: perplexity_at(run.curve, stop), best=min,
        ),
        "speed": Column(
            "Tokens/s", "training tokens per second, the whole step", wording.whole,
            lambda run: run.result["train"]["tokens_per_second"], best=max,
        ),
        "speed_up": Column(
            "Speed-up", "tokens per second relative to full softmax, paired by seed", wording.times,
            lambda run: run.result["train"]["tokens_per_second"], against=lambda own, full: own / full, best=max,
        ),
        "output_share": Column(
            "Output share", "share of the training step spent in the output layer", wording.share,
            lambda run: run.result["train"]["output_share"],
        ),
        "memory": Column(
            "Peak memory", "the largest memory of the training process", wording.megabytes,
            lambda run: run.result["memory"]["peak_bytes"], best=min,
        ),
        "parameters": Column(
            "Parameters", "of the whole model", wording.count,
            lambda run: run.result["parameters"]["total"], best=min,
        ),
    }  # fmt: skip
    if stop is None:
        del found["at_stop"]
    if not smoothed:
        del found["smoothed"], found["coverage"]
    return found


@dataclasses.dataclass(frozen=True)
class Style:
    """How a layer is drawn, everywhere: ``key`` names its colour in the page's style sheet."""

    key: str
    colour: str
    marker: str
    dash: str


# Okabe and Ito's colours without the yellow, which vanishes on white; the reference is drawn in the colour of the text.
# Each has a marker of its own, so that nothing hangs on colour alone.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#c4609a", "#d08a00", "#4aa3d8")
MARKERS = ("square", "diamond", "triangle-up", "triangle-down", "pentagon", "x")
DASHES = ("solid", "dash", "dot", "dashdot")


def styles() -> Iterator[Style]:
    """Yield style after style, no two alike."""
    for index in itertools.count():
        cycle, place = divmod(index, len(COLOURS))
        marker = MARKERS[(place + cycle) % len(MARKERS)]
        yield Style(f"layer-{place}", COLOURS[place], marker, DASHES[cycle % len(DASHES)])


@dataclasses.dataclass(frozen=True)
class Row:
    """One output layer, over its seeds; ``cells`` has what :func:`columns` says."""

    label: str
    style: Style
    runs: tuple[Run, ...]
    cells: dict[str, Spread | None]

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs that reached the end of their budget."""
        return tuple(run for run in self.runs if run.result)

    @property
    def inline(self) -> str:
        """The label within a sentence."""
        return self.label[0].lower() + self.label[1:]

    def mean(self, name: str) -> float:
        """The mean of a cell; 0 where there is none."""
        cell = self.cells.get(name)
        return cell.mean if cell else 0.0

    @property
    def note(self) -> str:
        """What a reader must know before the numbers: divergence."""
        lost = [run for run in self.runs if run.diverged]
        if not lost:
            return ""
        if len(self.runs) == 1:
            return f"diverged at step {lost[0].diverged['step']:,}"
        return f"{len(lost)} of {len(self.runs)} seeds diverged"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything that is told.

    Attributes:
        title: of the page.
        rows: the layers by test perplexity, diverged ones last.
        reference: the row of full softmax, if a run of it has finished.
        columns: of the main table.
        stop: the point to compare at; None when nothing has finished.
        left_out: ``(folder, reason)`` of each folder that takes no part.
    """

    title: str
    rows: list[Row]
    reference: Row | None
    columns: dict[str, Column]
    stop: Stop | None
    left_out: list[tuple[str, str]]

    @property
    def runs(self) -> list[Run]:
        """The runs, in the order of the rows."""
        return [run for row in self.rows for run in row.runs]

    @property
    def finished(self) -> list[Row]:
        """The layers of which a run has finished."""
        return [row for row in self.rows if row.finished]

    @property
    def seeds(self) -> int:
        """The largest number of seeds of any layer."""
        return max((len(row.runs) for row in self.rows), default=0)

    @property
    def unigram(self) -> dict[str, float] | None:
        """The baseline: perplexity of the words' training frequencies, ``test`` and ``valid``."""
        for row in self.finished:
            return {part: row.finished[0].result[part]["unigram_perplexity"] for part in ("test", "valid")}
        return None

    @property
    def best(self) -> dict[str, float | None]:
        """The best mean of each column that has a better end; None where all are alike."""
        found = {}
        for name, column in self.columns.items():
            means = {row.cells[name].mean for row in self.finished if row.cells[name]}
            found[name] = column.best(means) if column.best and len(means) > 1 else None
        return found


def compare(folders: Iterable[Path], title: str) -> Comparison:
    """Read run folders and work out every number."""
    runs, left_out = gather(folders)
    variants: dict[str, list[Run]] = {}
    for run in runs:
        variants.setdefault(json.dumps(run.config["output"], sort_keys=True), []).append(run)
    labels = _labels([variant[0] for variant in variants.values()])
    named = dict(sorted(zip(labels, variants.values(), strict=True)))
    reference = next((label for label, variant in named.items() if variant[0].layer == REFERENCE), None)
    stop = Stop.of(runs)
    table = columns(stop, smoothed=any(run.lacks_words for run in runs))
    others = styles()
    rows = []
    for label, variant in named.items():
        style = Style("ink", "#1a1a1a", "circle", "solid") if label == reference else next(others)
        cells = {name: column.over(variant, named.get(reference, ())) for name, column in table.items()}
        rows.append(Row(label, style, tuple(variant), cells))
    rows.sort(key=lambda row: (not row.finished, *(row.mean(name) for name in ("test", "smoothed")), row.label))
    full = next((row for row in rows if row.label == reference and row.finished), None)
    return Comparison(title, rows, full, table, stop, left_out)


def _labels(runs: Sequence[Run]) -> list[str]:
    """Name each variant by its layer, and by the options in which it differs from its namesakes."""
    labels = []
    for run in runs:
        namesakes = [flat(other.config["output"]) for other in runs if other.layer == run.layer]
        own = flat(run.config["output"])
        options = [f"{key}={own[key]}" for key in own if len({other.get(key) for other in namesakes}) > 1]
        labels.append(run.layer.replace("_", " ").capitalize() + (f" ({', '.join(options)})" if options else ""))
    return labels


@dataclasses.dataclass(frozen=True)
class Bands:
    """Mean test NLL by frequency band, nats per token.

    Attributes:
        labels: the ranks in each band, counted from 1.
        shares: each band's part of the test tokens.
        relative: whether the losses are differences to full softmax.
        rows: the layers and their losses; None in a band without test tokens.
    """

    labels: list[str]
    shares: list[float]
    relative: bool
    rows: list[tuple[Row, list[float | None]]]

    @classmethod
    def of(cls, comparison: Comparison) -> "Bands | None":
        """Work out which words pay: the loss of each layer by how frequent the word to predict is."""
        if not comparison.finished:
            return None
        frame = _frame(comparison.finished[0].finished[0])
        reference = comparison.reference.finished if comparison.reference else ()
        rows = []
        for row in comparison.finished:
            runs = [run for run in row.finished if _frame(run) == frame]
            losses = []
            for index in range(len(frame)):
                column = Column(
                    "", "", str, lambda run, index=index: run.result["test"]["bands"][index]["nll"],
                    against=_difference if reference else None,
                )  # fmt: skip
                spread = column.over(runs, reference)
                losses.append(spread.mean if spread else None)
            rows.append((row, losses))
        total = sum(tokens for *_, tokens in frame) or 1
        labels = [f"{first + 1:,}" if first == last else f"{first + 1:,}–{last + 1:,}" for first, last, _ in frame]
        return cls(labels, [tokens / total for *_, tokens in frame], bool(reference), rows)


def _frame(run: Run) -> list[tuple[int, int, int]]:
    return [(band["first"], band["last"], band["tokens"]) for band in run.result["test"]["bands"]]


def _difference(own: float | None, full: float | None) -> float | None:
    return None if own is None or full is None else own - full
