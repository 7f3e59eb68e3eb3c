"""Run folders in, one page out: which output layer wins at what, with the evidence.

``python -m experiments.report outputs/sotu/* --output outputs/report`` writes

- ``report.html``: one self-contained page that works from a file, offline;
- ``results.csv``: one line per run, unrounded;
- ``perplexity.svg``: validation perplexity against training time, for documents.

The same folders give the same bytes. Nothing here imports torch.
"""

import argparse
import csv
import dataclasses
import functools
import io
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.figure
import plotly.offline
from markupsafe import Markup
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

TEMPLATES = Path(__file__).parent / "templates"
REFERENCE = "full_softmax"

# Settings that are no condition of the comparison: what is compared, where it is written and who watches.
NOT_CONDITIONS = (
    "output.",
    "name.output",
    "seed",
    "run.",
    "wandb.",
    "study",
    "progress",
    "data.cache",
    "command",
    "identity",
)

# Okabe and Ito's colours without the yellow, which vanishes on white; the reference is drawn in the colour of the text.
# Each has its own marker, so that nothing hangs on colour alone. The page's style sheet lightens them on dark ground.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#c4609a", "#d08a00", "#4aa3d8")
MARKERS = ("square", "diamond", "triangle-up", "triangle-down", "pentagon", "x")
MATPLOTLIB_MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "triangle-down": "v"}
DASHES = ("solid", "dash", "dot", "dashdot")


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
        diverged: the line of ``metrics.jsonl`` that ended a diverged run; None otherwise.
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
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        diverged = lines[-1] if lines and lines[-1]["kind"] == "diverged" else None
        if not diverged and not (folder / "result.json").exists():
            raise RunError(f"not finished: its last record is of step {lines[-1]['step'] if lines else 0:,}")
        result = None if diverged else _json(folder / "result.json")
        # An overflowing validation cannot be drawn; that the run diverged is told by its last line.
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


def _json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise RunError(f"damaged: {file.name} holds no JSON object")
    return content


def _check(run: Run) -> None:
    """Fail on any field the page needs now, while the folder can still be left out."""
    for column, value in _csv_line(run).items():
        words = column in ("layer", "status", "folder")
        if not isinstance(value, str if words else int | float | None):
            raise RunError(f"damaged: {column} is {value!r}")
    if run.result and not math.isfinite(run.result["test"]["nll"]):
        raise RunError(f"its test loss is {run.result['test']['nll']}")
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
    corpora = Counter(json.dumps(run.corpus) for run in runs if run.result) or Counter(
        json.dumps(run.corpus) for run in runs
    )
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
            differing = ", ".join(_differing([other, run])) or "the same settings"
            left_out.append((run.name, f"same layer and seed as {other.name} under other settings ({differing})"))
        else:
            kept[identity] = run
    return list(kept.values()), sorted(left_out)


def _flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    """Name every leaf by its path; lists are leaves."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree if isinstance(tree, str) else json.dumps(tree)}
    return {key: value for name, child in tree.items() for key, value in _flatten(child, f"{prefix}{name}.").items()}


def _conditions(run: Run) -> dict[str, str]:
    everything = _flatten(run.config) | _flatten(run.environment)
    return {key: value for key, value in everything.items() if not key.startswith(NOT_CONDITIONS)}


def _differing(runs: Sequence[Run]) -> list[str]:
    """Name the conditions in which the runs are not alike."""
    conditions = [_conditions(run) for run in runs]
    keys = sorted(set(itertools.chain.from_iterable(conditions)))
    return [key for key in keys if len({condition.get(key) for condition in conditions}) > 1]


# -- what is compared -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Spread:
    """A number over seeds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Spread | None":
        """Summarise the values that are there; None when none is."""
        present = [value for value in values if value is not None and math.isfinite(value)]
        return cls(math.fsum(present) / len(present), min(present), max(present)) if present else None


@dataclasses.dataclass(frozen=True)
class Row:
    """One output layer, over its seeds. Differences and ratios are paired by seed with full softmax."""

    label: str
    key: str
    colour: str
    marker: str
    dash: str
    runs: tuple[Run, ...]
    test: Spread | None
    valid: Spread | None
    difference: Spread | None
    percent: Spread | None
    at_stop: Spread | None
    tokens_per_second: Spread | None
    speed_up: Spread | None
    output_share: Spread | None
    peak_bytes: Spread | None
    parameters: Spread | None

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs that reached the end of their budget."""
        return tuple(run for run in self.runs if run.result)

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
class Stop:
    """Where the first of the finished runs ended, on the axis that their budget left free: the point to compare at.

    Attributes:
        axis: ``"seconds"`` where the budget was in tokens or epochs, ``"tokens"`` where it was in seconds.
        value: how many of them.
    """

    axis: str
    value: float

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "Stop | None":
        """Find the axis on which the runs ended furthest apart."""
        ends = [run.curve[-1] for run in runs if run.result and run.curve]
        if not ends:
            return None
        lowest = {axis: min(end[axis] for end in ends) for axis in ("seconds", "tokens")}
        axis = max(lowest, key=lambda axis: max(end[axis] for end in ends) / (lowest[axis] or 1))
        return cls(axis, lowest[axis])

    def __str__(self) -> str:
        return duration(self.value) if self.axis == "seconds" else f"{count(self.value)} tokens"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All that the page shows."""

    title: str
    runs: list[Run]
    left_out: list[tuple[str, str]]
    rows: list[Row]
    reference: Row | None
    stop: "Stop | None"

    @property
    def corpus(self) -> str:
        """The text and the budget, in words."""
        finished = [run for run in self.runs if run.result]
        if not finished:
            return ""
        first = finished[0]
        parts = [f"{first.config['name']['data']}, {first.result['vocabulary']:,} words in the vocabulary"]
        trained = [run.result["train"] for run in finished]
        if len({train["tokens"] for train in trained}) == 1:
            parts.append(f"{count(trained[0]['tokens'])} training tokens each")
        else:
            span = [function(train["seconds"] for train in trained) for function in (min, max)]
            parts.append(f"{duration(span[0])} to {duration(span[1])} of training each")
        return "; ".join([*parts, f"{first.result['test']['tokens']:,} test tokens"])

    @property
    def seeds(self) -> int:
        """The largest number of seeds of any layer."""
        return max((len(row.runs) for row in self.rows), default=0)

    @property
    def unigram(self) -> dict[str, float] | None:
        """Perplexity of the words' training frequencies on ``test`` and ``valid``: the baseline."""
        finished = [run for run in self.runs if run.result]
        return (
            {part: finished[0].result[part]["unigram_perplexity"] for part in ("test", "valid")} if finished else None
        )


def compare(folders: Iterable[Path], title: str) -> Comparison:
    """Read run folders and work out every number of the page."""
    runs, left_out = gather(folders)
    stop = Stop.of(runs)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.config["output"], sort_keys=True), []).append(run)
    labels = _labels([group[0] for group in groups.values()])
    named = sorted(zip(labels, groups.values(), strict=True), key=lambda pair: (pair[1][0].layer != REFERENCE, pair[0]))
    reference = next((group for _, group in named if group[0].layer == REFERENCE), [])
    styles = _styles(has_reference=bool(reference))
    rows = [_row(label, group, reference, stop, *next(styles)) for label, group in named]
    rows.sort(key=lambda row: (row.test is None, row.test.mean if row.test else 0.0, row.label))
    reference_row = next((row for row in rows if row.runs[0] in reference and row.finished), None)
    return Comparison(title, runs, left_out, rows, reference_row, stop)


def _labels(runs: Sequence[Run]) -> list[str]:
    """Name each variant by its layer, and by the options in which it differs from its namesakes."""
    labels = []
    for run in runs:
        namesakes = [_flatten(other.config["output"]) for other in runs if other.layer == run.layer]
        own = _flatten(run.config["output"])
        options = [f"{key}={own[key]}" for key in own if len({other.get(key) for other in namesakes}) > 1]
        labels.append(run.layer.replace("_", " ").capitalize() + (f" ({', '.join(options)})" if options else ""))
    return labels


def _styles(*, has_reference: bool) -> Iterable[tuple[str, str, str, str]]:
    """Yield key, colour, marker and dash, the reference's first."""
    if has_reference:
        yield "ink", "#1a1a1a", "circle", "solid"
    for index in itertools.count():
        cycle, place = divmod(index, len(COLOURS))
        marker = MARKERS[(place + cycle) % len(MARKERS)]
        yield f"layer-{place}", COLOURS[place], marker, DASHES[cycle % len(DASHES)]


def _row(
    label: str,
    runs: Sequence[Run],
    reference: Sequence[Run],
    stop: Stop | None,
    key: str,
    colour: str,
    marker: str,
    dash: str,
) -> Row:
    results = [run.result for run in runs if run.result]
    by_seed = {run.seed: run.result for run in reference if run.result}
    pairs = [(run.result, by_seed[run.seed]) for run in runs if run.result and run.seed in by_seed]

    def paired(function: Callable[[float, float], float], *path: str) -> Spread | None:
        return Spread.of(function(_at(own, *path), _at(full, *path)) for own, full in pairs)

    def over_seeds(*path: str) -> Spread | None:
        return Spread.of(_at(result, *path) for result in results)

    return Row(
        label=label,
        key=key,
        colour=colour,
        marker=marker,
        dash=dash,
        runs=tuple(runs),
        test=over_seeds("test", "perplexity"),
        valid=over_seeds("valid", "perplexity"),
        difference=paired(lambda own, full: own - full, "test", "perplexity"),
        percent=paired(lambda own, full: 100 * (own / full - 1), "test", "perplexity"),
        at_stop=Spread.of(perplexity_at(run.curve, stop) for run in runs if run.result and stop),
        tokens_per_second=over_seeds("train", "tokens_per_second"),
        speed_up=paired(lambda own, full: own / full, "train", "tokens_per_second"),
        output_share=over_seeds("train", "output_share"),
        peak_bytes=over_seeds("memory", "peak_bytes"),
        parameters=over_seeds("parameters", "total"),
    )


def _at(tree: dict[str, Any], *path: str) -> Any:
    return functools.reduce(lambda node, key: node[key], path, tree)


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


# -- the answer -----------------------------------------------------------------------------------------------------


def winners(comparison: Comparison) -> list[tuple[str, Row, str]]:
    """Return ``(what, layer, number)`` of the best at perplexity, at speed and at memory."""
    rows = [row for row in comparison.rows if row.finished]
    found = []
    if ranked := [row for row in rows if row.test]:
        best = min(ranked, key=lambda row: row.test.mean)
        found.append(("Best perplexity", best, perplexity(best.test.mean)))
    if ranked := [row for row in rows if row.tokens_per_second]:
        best = max(ranked, key=lambda row: row.tokens_per_second.mean)
        found.append(("Fastest", best, f"{best.tokens_per_second.mean:,.0f} tokens/s"))
    if ranked := [row for row in rows if row.peak_bytes]:
        best = min(ranked, key=lambda row: row.peak_bytes.mean)
        found.append(("Smallest memory", best, megabytes(best.peak_bytes.mean)))
    return found


def _best(rows: Sequence[Row]) -> dict[str, float | None]:
    """Return the best mean of each column: the largest speed, the smallest of everything else; None for a lone row."""
    best: dict[str, float | None] = {}
    for name in ("test", "valid", "at_stop", "tokens_per_second", "speed_up", "peak_bytes", "parameters"):
        means = [getattr(row, name).mean for row in rows if getattr(row, name)]
        pick = max if name in ("tokens_per_second", "speed_up") else min
        best[name] = pick(means) if len(set(means)) > 1 else None
    return best


def answer(comparison: Comparison) -> str:
    """Say in one plain sentence which layer wins at what."""
    finished = [row for row in comparison.rows if row.finished]
    if not finished:
        return "No run has finished, so there is nothing to compare."
    if len(finished) == 1:
        only = finished[0]
        return (
            f"Only {_inline(only)} has finished, with a test perplexity of {perplexity(only.test.mean)}; "
            "a comparison needs a second layer."
        )
    verbs = {
        "Best perplexity": lambda row, number: f"predicts best (test perplexity {number})",
        "Fastest": lambda row, number: (
            f"trains fastest ({times(row.speed_up.mean)} full softmax's speed)"
            if row.speed_up and row is not comparison.reference
            else f"trains fastest ({number})"
        ),
        "Smallest memory": lambda row, number: f"needs the least memory ({number} at its peak)",
    }
    clauses: dict[str, list[str]] = {}
    for what, row, number in winners(comparison):
        clauses.setdefault(_inline(row), []).append(verbs[what](row, number))
    sentence = "; ".join(f"{layer} {_join(parts)}" for layer, parts in clauses.items())
    return sentence[0].upper() + sentence[1:] + "."


def caveats(comparison: Comparison) -> list[str]:
    """Say what the answer does not say."""
    notes = []
    stopped = [row for row in comparison.rows if row.at_stop]
    if len(stopped) > 1:
        best = min(stopped, key=lambda row: row.at_stop.mean)
        equal = "training time" if comparison.stop.axis == "seconds" else "training text"
        notes.append(
            f"After equal {equal} ({comparison.stop}, when the first run ended) {_inline(best)} has the lowest "
            f"validation perplexity, {perplexity(best.at_stop.mean)}."
        )
    if comparison.seeds == 1:
        notes.append("One seed per layer: differences as small as those between two seeds of one layer mean nothing.")
    elif comparison.seeds > 1:
        notes.append(f"Means over up to {comparison.seeds} seeds; no test of significance has been made.")
    if len(comparison.rows) > 1 and comparison.reference is None:
        notes.append("No run of full softmax has finished: differences to it and speed-ups are missing.")
    notes += [f"{row.label}: {row.note}." for row in comparison.rows if row.note]
    conditions = [key for key in _differing(comparison.runs) if not key.startswith("optim.output_learning_rate")]
    if conditions:
        notes.append(f"The runs differ in more than layer and seed: {', '.join(conditions)}.")
    return notes


def _inline(row: Row) -> str:
    return row.label[0].lower() + row.label[1:]


def _join(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]


# -- numbers for people ---------------------------------------------------------------------------------------------


def perplexity(value: float) -> str:
    """Four figures or so."""
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def signed(value: float) -> str:
    """A difference in perplexity."""
    return f"{value:+,.1f}".replace("-", "−")


def times(value: float) -> str:
    """A ratio."""
    return f"{value:.1f}×" if value < 10 else f"{value:.0f}×"


def megabytes(value: float) -> str:
    """10^6 bytes."""
    return f"{value / 1e6:,.0f}\u00a0MB"


def duration(value: float) -> str:
    """Seconds, or minutes and seconds."""
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes}\u00a0min {seconds}\u00a0s" if minutes else f"{seconds}\u00a0s"


def percent(value: float) -> str:
    """A relative difference."""
    return f"{value:+.1f}\u00a0%".replace("-", "−")


def share(value: float) -> str:
    """A part of a whole."""
    return f"{value:.0%}"


def whole(value: float) -> str:
    """A rate."""
    return f"{value:,.0f}"


def nats(value: float, relative: bool) -> str:
    """A loss, or a difference of losses."""
    return f"{value:+.3f}".replace("-", "−") if relative else f"{value:.3f}"


def count(value: float) -> str:
    """A number of tokens or parameters."""
    return f"{value / 1e6:,.2f}\u00a0M" if value >= 1e6 else f"{value:,.0f}"


FORMATS = (perplexity, signed, percent, times, share, whole, megabytes, duration, count, nats)

# -- figures --------------------------------------------------------------------------------------------------------
# Plotly's own dictionaries. A colour "@name" stands for the style sheet's variable --name, so that the page can follow
# the reader's light or dark setting.

AXIS = {"gridcolor": "@grid", "linecolor": "@rule", "zeroline": False, "automargin": True, "ticks": ""}
LAYOUT = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"family": "inherit", "size": 12, "color": "@soft"},
    "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
    "showlegend": False,
    "dragmode": False,
    "hovermode": "closest",
    "hoverlabel": {"bgcolor": "@paper", "bordercolor": "@rule", "font": {"color": "@ink", "family": "inherit"}},
}


def curve_figure(comparison: Comparison, axis: str) -> dict[str, Any]:
    """Draw validation perplexity, on a log scale, against ``seconds`` or ``tokens``."""
    traces = []
    for row in comparison.rows:
        for run in row.runs:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": row.label,
                    "meta": row.label,
                    "x": [point[axis] for point in run.curve],
                    "y": [point["perplexity"] for point in run.curve],
                    "customdata": [
                        [run.seed, duration(point["seconds"]), count(point["tokens"])] for point in run.curve
                    ],
                    "hovertemplate": "<b>%{meta}</b>, seed %{customdata[0]}<br>perplexity %{y:.1f}"
                    "<br>%{customdata[1]}, %{customdata[2]} tokens<extra></extra>",
                    "line": {"color": f"@{row.key}", "width": 2, "dash": row.dash},
                    "marker": {"symbol": row.marker, "size": 6, "color": f"@{row.key}"},
                }
            )
            if run.diverged and run.curve:
                traces.append(
                    {
                        "type": "scatter",
                        "mode": "markers+text",
                        "meta": row.label,
                        "x": [run.curve[-1][axis]],
                        "y": [run.curve[-1]["perplexity"]],
                        "text": ["diverged"],
                        "textposition": "top right",
                        "hoverinfo": "skip",
                        "marker": {"symbol": "x-thin-open", "size": 14, "color": f"@{row.key}"},
                    }
                )
    values = [point["perplexity"] for run in comparison.runs for point in run.curve]
    x_axis = AXIS | {"title": {"text": f"training {axis}"}, "rangemode": "tozero"}
    y_axis = AXIS | {"title": {"text": "validation perplexity"}, "type": "log"}
    if values:
        y_axis |= _log_axis(min(values), max(values))
    return {"data": traces, "layout": LAYOUT | {"xaxis": x_axis, "yaxis": y_axis}}


def _log_axis(low: float, high: float) -> dict[str, Any]:
    margin = (high / low) ** 0.05 if high > low else 1.5
    low, high = low / margin, high * margin
    ticks = log_ticks(low, high)
    return {
        "tickvals": ticks,
        "ticktext": [f"{tick:,.6g}" for tick in ticks],
        "range": [math.log10(low), math.log10(high)],
    }


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers that cover ``[low, high]`` on a log scale, about four to nine of them."""
    fine = tuple(1 + tenth / 10 for tenth in range(90))
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), fine):
        decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
        ticks = [round(step * 10.0**decade, 6) for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            break
    return ticks[:: max(1, len(ticks) // 8)]


@dataclasses.dataclass(frozen=True)
class Bands:
    """Mean test NLL by frequency band: nats per token, relative to full softmax where there is one."""

    labels: list[str]
    shares: list[float]
    relative: bool
    rows: list[tuple[Row, list[float | None]]]


def bands(comparison: Comparison) -> Bands | None:
    """Work out which words pay: the loss of each layer by how frequent the word to predict is."""
    rows = [row for row in comparison.rows if row.finished]
    if not rows:
        return None
    frame = [(band["first"], band["last"], band["tokens"]) for band in rows[0].finished[0].result["test"]["bands"]]
    total = sum(tokens for *_, tokens in frame) or 1
    reference = comparison.reference

    def losses(run: Run) -> list[float | None] | None:
        found = run.result["test"]["bands"]
        same = [(band["first"], band["last"], band["tokens"]) for band in found] == frame
        return [band["nll"] for band in found] if same else None

    full = {run.seed: losses(run) for run in reference.finished} if reference else {}
    table = []
    for row in rows:
        per_run = [(losses(run), full.get(run.seed)) for run in row.finished]
        if reference:
            per_run = [(own, zero) for own, zero in per_run if own and zero]
            columns = [[_minus(own[i], zero[i]) for own, zero in per_run] for i in range(len(frame))]
        else:
            columns = [[own[i] for own, _ in per_run if own] for i in range(len(frame))]
        means = [Spread.of(column) for column in columns]
        table.append((row, [mean.mean if mean else None for mean in means]))
    labels = [f"{first + 1:,}" if first == last else f"{first + 1:,}–{last + 1:,}" for first, last, _ in frame]
    return Bands(labels, [tokens / total for *_, tokens in frame], reference is not None, table)


def _minus(own: float | None, full: float | None) -> float | None:
    return None if own is None or full is None else own - full


def band_figure(table: Bands) -> dict[str, Any]:
    """Draw the loss by frequency band."""
    what = "nats per token above full softmax" if table.relative else "nats per token"
    positions = list(range(len(table.labels)))
    ticks = [f"{label}<br>{share(part)}" for label, part in zip(table.labels, table.shares, strict=True)]
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": row.label,
            "meta": row.label,
            "x": positions,
            "y": losses,
            "customdata": table.labels,
            "hovertemplate": f"<b>%{{meta}}</b><br>words %{{customdata}}<br>%{{y:+.3f}} {what}<extra></extra>",
            "line": {"color": f"@{row.key}", "width": 2, "dash": row.dash},
            "marker": {"symbol": row.marker, "size": 8, "color": f"@{row.key}"},
        }
        for row, losses in table.rows
    ]
    x_axis = AXIS | {
        "title": {"text": "rank of the word to predict, and share of the test tokens"},
        "tickvals": positions,
        "ticktext": ticks,
        "showgrid": False,
        "range": [-0.25, len(positions) - 0.75],
    }
    y_axis = AXIS | {
        "title": {"text": what},
        "zeroline": table.relative,
        "zerolinecolor": "@rule",
        "zerolinewidth": 1.5,
    }
    return {"data": traces, "layout": LAYOUT | {"xaxis": x_axis, "yaxis": y_axis}}


def still_figure(comparison: Comparison) -> str:
    """Draw validation perplexity against training time as an SVG for documents."""
    with matplotlib.rc_context({"svg.hashsalt": "lvsoftmax", "font.family": "sans-serif", "font.size": 10}):
        figure = matplotlib.figure.Figure(figsize=(8, 4.2), layout="constrained")
        axes = figure.subplots()
        values = [point["perplexity"] for run in comparison.runs for point in run.curve]
        for row in comparison.rows:
            for index, run in enumerate(row.runs):
                label = f"{row.label}{f' ({row.note})' if row.note else ''}" if index == 0 else None
                axes.plot(
                    [point["seconds"] for point in run.curve],
                    [point["perplexity"] for point in run.curve],
                    color=row.colour,
                    linestyle={"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}[row.dash],
                    marker=MATPLOTLIB_MARKERS.get(row.marker, "P"),
                    markersize=3.5,
                    linewidth=1.6,
                    label=label,
                )
        axes.set(xlabel="training seconds", ylabel="validation perplexity", yscale="log", xlim=(0, None))
        if values:
            ticks = log_ticks(min(values), max(values))
            axes.set_yticks(ticks, [f"{tick:,.6g}" for tick in ticks])
            axes.set_yticks([], minor=True)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        if values:
            figure.legend(loc="outside right upper", frameon=False)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


# -- what is written ------------------------------------------------------------------------------------------------


def _csv_line(run: Run) -> dict[str, Any]:
    """One run, unrounded, as a line of ``results.csv``."""
    line: dict[str, Any] = {"layer": run.layer, "seed": run.seed, "status": "finished" if run.result else "diverged"}
    result = run.result
    for part in ("valid", "test"):
        for name in ("perplexity", "nll", "tokens", "unigram_perplexity"):
            line[f"{part}_{name}"] = result[part][name] if result else None
    for name in ("tokens", "seconds", "steps", "epochs", "tokens_per_second", "output_share"):
        line[f"train_{name}"] = result["train"][name] if result else (run.diverged or {}).get(name)
    line["train_steps"] = line["train_steps"] if result else run.diverged and run.diverged["step"]
    line["peak_bytes"] = result["memory"]["peak_bytes"] if result else None
    for name in ("total", "output", "embedding", "backbone"):
        line[f"parameters_{name}"] = result["parameters"][name] if result else None
    line["vocabulary"] = result["vocabulary"] if result else None
    line["folder"] = run.name
    return line


def results_csv(comparison: Comparison) -> str:
    """One line per run, in the order of the table."""
    lines = [_csv_line(run) for row in comparison.rows for run in row.runs]
    stream = io.StringIO()
    header = list(lines[0]) if lines else ["layer", "seed", "status", "test_perplexity", "folder"]
    writer = csv.DictWriter(stream, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def text_table(comparison: Comparison) -> str:
    """The main table for a terminal."""
    head = ("output layer", "test ppl", "vs full", "tokens/s", "speed-up", "output share", "memory", "parameters")
    body = [
        (
            row.label + (f" ({row.note})" if row.note else ""),
            *(
                show(spread.mean) if spread else "-"
                for show, spread in (
                    (perplexity, row.test),
                    (signed, row.difference),
                    (whole, row.tokens_per_second),
                    (times, row.speed_up),
                    (share, row.output_share),
                    (megabytes, row.peak_bytes),
                    (count, row.parameters),
                )
            ),
        )
        for row in comparison.rows
    ]
    if comparison.unigram:
        body.append(("(unigram)", perplexity(comparison.unigram["test"]), *["-"] * 6))
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = ["  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]) for cells in (head, *body)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def html(comparison: Comparison) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {function.__name__: function for function in FORMATS}
    by_band = bands(comparison)
    drawn = {}
    if any(run.curve for run in comparison.runs):
        drawn |= {f"curve-{axis}": curve_figure(comparison, axis) for axis in ("seconds", "tokens")}
    if by_band:
        drawn["bands"] = band_figure(by_band)
    differing = _differing(comparison.runs)
    shared = _conditions(comparison.runs[0]) if comparison.runs else {}
    context = {
        "comparison": comparison,
        "answer": answer(comparison),
        "caveats": caveats(comparison),
        "best": _best(comparison.rows),
        "winners": winners(comparison) if sum(bool(row.finished) for row in comparison.rows) > 1 else [],
        "bands": by_band,
        "differing": differing,
        "conditions": {run.name: _conditions(run) for run in comparison.runs},
        "shared": {key: value for key, value in sorted(shared.items()) if key not in differing},
        "figures": {
            name: Markup(json.dumps(figure, allow_nan=False).replace("</", "<\\/")) for name, figure in drawn.items()
        },
        "plotly": Markup(plotly.offline.get_plotlyjs()) if drawn else "",
        "style": Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        "script": Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
    }
    return environment.get_template("report.html.j2").render(context)


def write(folders: Iterable[Path], output: Path, title: str) -> Comparison:
    """Write ``report.html``, ``results.csv`` and ``perplexity.svg`` about the run folders into ``output``."""
    comparison = compare(folders, title)
    output.mkdir(parents=True, exist_ok=True)
    files = {
        "report.html": html(comparison),
        "results.csv": results_csv(comparison),
        "perplexity.svg": still_figure(comparison),
    }
    for name, text in files.items():
        (output / name).write_text(text, encoding="utf-8")
    return comparison


def main() -> None:
    """Write the report of the folders named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="run folders")
    parser.add_argument("--output", type=Path, default=Path("outputs/report"), help="where to write (%(default)s)")
    parser.add_argument("--title", default="Output layers compared", help="the page's title")
    arguments = parser.parse_args()
    comparison = write(arguments.folders, arguments.output, arguments.title)
    print(text_table(comparison))
    for name, reason in comparison.left_out:
        print(f"left out: {name}: {reason}")
    print(arguments.output / "report.html")


if __name__ == "__main__":
    main()
