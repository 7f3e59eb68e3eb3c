"""Runs of one setting compared: every number that is told about them.

What is averaged is one output layer over its seeds. Imports no torch.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import wording
from experiments.reading import Run, flat
from experiments.setting import Setting, gather, layer_identity, options
from experiments.statistics import Difference, Interval, judged
from experiments.studies import StudyRecord
from experiments.style import OF_REFERENCE, Style, styles

REFERENCE = "full_softmax"
"""The output layer that the others are measured against."""


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
        ends = [run.result["train"] for run in runs if run.result]
        if not ends:
            return None
        lowest = {axis: min(end[axis] for end in ends) for axis in ("seconds", "tokens")}
        axis = max(lowest, key=lambda axis: max(end[axis] for end in ends) / (lowest[axis] or 1))
        return cls(axis, lowest[axis])

    def __str__(self) -> str:
        return wording.duration(self.value) if self.axis == "seconds" else f"{wording.count(self.value)} tokens"


def perplexity_at(curve: Sequence[dict[str, Any]], stop: Stop) -> float | None:
    """Return the validation perplexity at a time or a number of tokens; None outside of the curve.

    Between two validations the mean loss is taken to fall in proportion to the logarithm of time or tokens, as losses
    about do: along a straight line in time itself, a layer with few validations would lie too high, as its curve sags
    below the line. From zero, which has no logarithm, there is that line only.
    """
    axis, value = stop.axis, stop.value
    for left, right in itertools.pairwise(curve):
        if left[axis] <= value <= right[axis]:
            start, place, end = (math.log(one) if left[axis] > 0 else one for one in (left[axis], value, right[axis]))
            part = (place - start) / (end - start) if end > start else 1.0
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
        logarithmic: whether means and intervals are taken of its logarithm, as for perplexities and ratios.
        relative: whether it is a ratio to that of the reference at the same seed.
        same_machine: whether the two of such a ratio must have run on one machine.
        best: ``min`` or ``max``, where one end is the better one.
        spread: whether the interval is shown.
        whole: whether there is a mean only where every finished run has a value.
    """

    heading: str
    explanation: str
    show: Callable[[float], str]
    value: Callable[[Run], float | None]
    logarithmic: bool = False
    relative: bool = False
    same_machine: bool = False
    best: Callable[[Iterable[float]], float] | None = None
    spread: bool = False
    whole: bool = False

    def over(self, runs: Sequence[Run], reference: Sequence[Run]) -> Interval | None:
        """Summarise the finished ones of ``runs``; a relative number over those that the reference has beside them."""
        own = self._values(runs)
        if self.whole and len(own) < sum(run.result is not None for run in runs):
            return None
        if self.relative:
            if self.same_machine:
                own = self._values(beside(runs, reference))
            difference = Difference.paired(own, self._values(reference))
            found = difference and difference.interval
        else:
            found = Interval.of(list(own.values())) if own else None
        return found and found.transformed(math.exp) if self.logarithmic else found

    def _values(self, runs: Sequence[Run]) -> dict[int, float]:
        values = {run.seed: self.value(run) for run in runs if run.result}
        present = {seed: value for seed, value in values.items() if value is not None and not math.isnan(value)}
        return {seed: math.log(value) for seed, value in present.items()} if self.logarithmic else present


def beside(runs: Iterable[Run], reference: Iterable[Run]) -> list[Run]:
    """Return the runs beside which there is one of the reference: of the same seed, on the same machine."""
    there = {(run.seed, run.machine) for run in reference}
    return [run for run in runs if (run.seed, run.machine) in there]


def columns(stop: Stop | None, *, smoothed: bool) -> dict[str, Column]:
    """Return the columns of the main table, with what infinite perplexities are compared by where ``smoothed``."""
    found = {
        "test": Column(
            "Test perplexity", "exp of the exact mean negative log-likelihood of the test text", wording.perplexity,
            lambda run: run.result["test"]["perplexity"], logarithmic=True, best=min, spread=True,
        ),
        "smoothed": Column(
            "Smoothed perplexity", "the same when 1 % of all probability is shared equally by the words, so that none "
            "has probability zero (Martins et al. 2020)", wording.perplexity,
            lambda run: run.result["test"].get("epsilon_perplexity"), logarithmic=True, best=min, spread=True,
        ),
        "coverage": Column(
            "Coverage", "share of the test tokens whose probability is above zero", wording.most,
            lambda run: run.result["test"].get("coverage"),
        ),
        "difference": Column(
            "Against full softmax", "difference in test perplexity, paired by seed; smoothed where words have no "
            "probability", wording.percent, lambda run: run.perplexity, logarithmic=True, relative=True, spread=True,
        ),
        "at_stop": Column(
            f"Validation after {stop}", "validation perplexity when the first run ended", wording.perplexity,
            lambda run: perplexity_at(run.curve, stop), logarithmic=True, best=min, spread=True, whole=True,
        ),
        "speed": Column(
            "Tokens/s", "training tokens per second, the whole step", wording.whole,
            lambda run: run.result["train"]["tokens_per_second"], logarithmic=True, best=max,
        ),
        "speed_up": Column(
            "Speed-up", "tokens per second relative to full softmax on the same machine, paired by seed", wording.times,
            lambda run: run.result["train"]["tokens_per_second"], logarithmic=True, relative=True, same_machine=True,
            best=max,
        ),
        "output_share": Column(
            "Output share", "share of the training step spent in the output layer", wording.share,
            lambda run: run.result["train"]["output_share"],
        ),
        "memory": Column(
            "Peak memory", "the largest memory of the training process", wording.megabytes,
            lambda run: run.result["memory"]["peak_bytes"] or None, best=min,  # none of a few steps
        ),
        "parameters": Column(
            "Parameters", "of the whole model", wording.count,
            lambda run: run.result["parameters"]["total"], best=min,
        ),
        "flops": Column(
            "FLOPs per token", "counted operations of a training step in the output layer", wording.large,
            lambda run: run.flops, best=min,
        ),
    }  # fmt: skip
    if stop is None:
        del found["at_stop"]
    if not smoothed:
        del found["smoothed"], found["coverage"]
    return found


@dataclasses.dataclass(frozen=True)
class Row:
    """One output layer, over its seeds.

    Attributes:
        label: its name for people.
        style: how it is drawn.
        runs: finished and diverged ones.
        cells: what :func:`columns` says.
        difference: of its test loss to full softmax's, in nats per token; None for full softmax, and without a pair.
    """

    label: str
    style: Style
    runs: tuple[Run, ...]
    cells: dict[str, Interval | None]
    difference: Difference | None

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs that reached the end of their budget."""
        return tuple(run for run in self.runs if run.result)

    @property
    def inline(self) -> str:
        """The label within a sentence."""
        return self.label[0].lower() + self.label[1:]

    @property
    def perplexity(self) -> float | None:
        """Mean test perplexity, or the smoothed one where the other is infinite; None if no run has finished."""
        for name in ("test", "smoothed"):
            cell = self.cells.get(name)
            if cell and math.isfinite(cell.mean):
                return cell.mean
        return math.inf if self.finished else None

    @property
    def verdict(self) -> str:
        """Better, worse or not distinguishable; nothing where no test was made."""
        return (self.difference.verdict if self.difference else None) or ""

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
    """Everything that is told about one setting.

    Attributes:
        setting: what the runs share.
        rows: the layers by test perplexity, diverged ones last.
        reference: the row of full softmax, if a run of it has finished.
        columns: of the main table.
        stop: the point to compare at; None when nothing has finished.
    """

    setting: Setting
    rows: list[Row]
    reference: Row | None
    columns: dict[str, Column]
    stop: Stop | None

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
    def vocabulary(self) -> int | None:
        """The number of words; None when nothing has finished."""
        return next((row.finished[0].result["vocabulary"] for row in self.finished), None)

    @property
    def unigram(self) -> dict[str, float] | None:
        """The baseline: perplexity of the words' training frequencies, ``test`` and ``valid``."""
        for row in self.finished:
            return {part: row.finished[0].result[part]["unigram_perplexity"] for part in ("test", "valid")}
        return None

    @property
    def generated(self) -> bool:
        """Whether the text is a made one, whose source is known."""
        return _generated(self.runs)

    @property
    def elsewhere(self) -> list[Row]:
        """The layers that share seeds with full softmax but no machine, so that their speeds cannot be compared."""
        if self.reference is None:
            return []
        full = self.reference.finished
        seeds = {run.seed for run in full}
        return [
            row for row in self.finished
            if any(run.seed in seeds for run in row.finished) and not beside(row.finished, full)
        ]  # fmt: skip

    @property
    def has_verdicts(self) -> bool:
        """Whether there were seeds enough for any."""
        return any(row.verdict for row in self.rows)

    @property
    def best(self) -> dict[str, float | None]:
        """The best mean of each column that has a better end; None where all are alike."""
        found = {}
        for name, column in self.columns.items():
            means = {row.cells[name].mean for row in self.finished if row.cells[name]}
            found[name] = column.best(means) if column.best and len(means) > 1 else None
        return found

    def seconds(self, row: Row) -> float:
        """Return the mean training time of a layer; for a million tokens where all trained equally long."""
        trained = [run.result["train"] for run in row.finished]
        times = [1e6 / one["tokens_per_second"] if self.setting.in_time else one["seconds"] for one in trained]
        return math.fsum(times) / len(times)

    def memory(self, row: Row) -> float:
        """Return the mean peak memory of a layer; infinite where it was not measured."""
        return row.mean("memory") or math.inf

    @property
    def ranking(self) -> Column:
        """The perplexity that layers are ranked by: smoothed for all where one gives some words no probability."""
        return self.columns.get("smoothed") or self.columns["test"]

    def level(self, row: Row) -> float:
        """Return the mean of the perplexity that layers are ranked by; infinite where a layer has none."""
        cell = row.cells["smoothed" if "smoothed" in self.columns else "test"]
        return cell.mean if cell else math.inf

    def frontier(self, cost: Callable[[Row], float]) -> list[Row]:
        """Return the layers that no other beats in perplexity and cost at once, the cheapest first.

        Those that lack one of the two take no part.
        """
        known = [row for row in self.finished if math.isfinite(self.level(row)) and math.isfinite(cost(row))]
        found: list[Row] = []
        for row in sorted(known, key=lambda row: (cost(row), self.level(row))):
            if not found or self.level(row) < self.level(found[-1]):
                found.append(row)
        return found


@dataclasses.dataclass(frozen=True)
class Survey:
    """All that a page tells: comparisons, and what stands beside them.

    Attributes:
        title: of the page.
        comparisons: one for each setting, by the size of its vocabulary.
        left_out: ``(folder, reason)`` of each folder that takes no part.
        studies: the records of the studies, with the searches for learning rates.
        smoke: ``(folder, outcome)`` of runs that only show that a layer trains.
    """

    title: str
    comparisons: list[Comparison]
    left_out: list[tuple[str, str]]
    studies: list[StudyRecord] = dataclasses.field(default_factory=list)
    smoke: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        """The runs that are compared."""
        return [run for comparison in self.comparisons for run in comparison.runs]

    @property
    def rows(self) -> list[Row]:
        """A row for each layer, the first of its settings'."""
        return list({row.label: row for comparison in reversed(self.comparisons) for row in comparison.rows}.values())


def survey(folders: Iterable[Path], title: str, studies: Iterable[Path] = ()) -> Survey:
    """Read run folders and the records of studies, and work out every number.

    Args:
        folders: of runs.
        title: of the page.
        studies: files ``study.json``; runs that they name and that lie below the same root take part, too.
    """
    folders = [Path(folder) for folder in folders]
    records, left_out = StudyRecord.read_all(studies)
    aside: dict[str, str] = {}
    smoke: dict[str, str] = {}
    for record in records:
        folders += record.folders(record.runs)
        aside |= record.aside
        smoke |= record.smoke_outcomes()
    kept, unfit = gather(folders, aside, [run for record in records for run in record.runs])
    kept.sort(key=lambda found: _place(*found))
    named = _labels([run for _, runs in kept for run in runs])
    others, looks = styles(), {}
    # The colours that are told apart best go to the layers that are in most settings, and in those shown first.
    labels = [sorted({named[layer_identity(run)] for run in runs}) for _, runs in kept]
    often = Counter(itertools.chain.from_iterable(labels))
    for label in sorted(often, key=often.__getitem__, reverse=True):
        plain = label == REFERENCE.replace("_", " ").capitalize() or label.startswith("Full softmax (")
        looks[label] = OF_REFERENCE if plain and OF_REFERENCE not in looks.values() else next(others)
    comparisons = [_compare(setting, runs, named, looks) for setting, runs in kept]
    return Survey(title, comparisons, sorted([*left_out, *unfit]), records, sorted(smoke.items()))


def _compare(setting: Setting, runs: Sequence[Run], named: Mapping[str, str], looks: Mapping[str, Style]) -> Comparison:
    variants: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (named[layer_identity(run)], run.seed)):
        variants.setdefault(named[layer_identity(run)], []).append(run)
    reference = next((label for label, variant in variants.items() if variant[0].layer == REFERENCE), None)
    stop = Stop.of(runs)
    table = columns(stop, smoothed=any(run.lacks_words for run in runs))
    full = variants.get(reference, [])
    # In equal time a fast machine is a head start.
    differences = judged({
        label: _difference(beside(variant, full) if setting.in_time else variant, full)
        for label, variant in variants.items() if label != reference
    })  # fmt: skip
    rows = []
    for label, variant in variants.items():
        cells = {name: column.over(variant, full) for name, column in table.items()}
        difference = differences.get(label)
        cells["difference"] = difference and difference.interval.transformed(math.expm1)
        if label == reference and any(run.result for run in variant):
            cells["difference"] = Interval(0.0, None, None, 1)
        rows.append(Row(label, looks[label], tuple(variant), cells, difference))
    rows.sort(key=lambda row: (not row.finished, *(row.mean(name) for name in ("test", "smoothed")), row.label))
    finished = next((row for row in rows if row.label == reference and row.finished), None)
    return Comparison(setting, rows, finished, table, stop)


def _difference(variant: Sequence[Run], full: Sequence[Run]) -> Difference | None:
    """Compare losses of one kind: smoothed on both sides and in all seeds where words have no probability in one."""
    smoothed = any(run.lacks_words for run in variant)
    return Difference.paired(_losses(variant, smoothed=smoothed), _losses(full, smoothed=smoothed))


def _losses(runs: Sequence[Run], *, smoothed: bool) -> dict[int, float]:
    """Return the test loss by seed, in nats per token."""
    found = {}
    for run in runs:
        if run.result:
            test = run.result["test"]
            found[run.seed] = math.log(test.get("epsilon_perplexity", math.inf) if smoothed else run.perplexity)
    return found


def _place(setting: Setting, runs: list[Run]) -> tuple[bool, int, Setting]:
    """Return what settings are ordered by: real text comes before generated text, small vocabularies before large."""
    return _generated(runs), max((run.result["vocabulary"] for run in runs if run.result), default=0), setting


def _generated(runs: Iterable[Run]) -> bool:
    return any(run.result["test"].get("source_nll") is not None for run in runs if run.result)


def _labels(runs: Iterable[Run]) -> dict[str, str]:
    """Name each variant by its layer, and by the options in which it differs from its namesakes."""
    variants = {layer_identity(run): run for run in runs}
    labels = {}
    for identity, run in variants.items():
        namesakes = [flat(options(other)) for other in variants.values() if other.layer == run.layer]
        own = flat(options(run))
        unlike = [key for key in own if own[key] != "null" and len({other.get(key) for other in namesakes}) > 1]
        said = ", ".join(f"{key}={own[key]}" for key in unlike)
        labels[identity] = run.layer.replace("_", " ").capitalize() + (f" ({said})" if said else "")
    return labels
