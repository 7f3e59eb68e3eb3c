"""Figures, each described once and drawn twice: by Plotly for the page, here; for documents in ``experiments.stills``.

Plotly's are its own dictionaries. A colour "@name" stands for the style sheet's variable --name, so that the page can
follow the reader's light or dark setting.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import wording
from experiments.breakdown import Bands, Sweep
from experiments.comparison import Comparison, Row
from experiments.reading import Run
from experiments.scaling import Scaling
from experiments.style import OF_REFERENCE, Style

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


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a chart.

    Attributes:
        title: what it measures.
        logarithmic: its scale.
        span: the first and last value shown; None: all there are.
        ticks: value and text of each; None: chosen by the drawing library.
        zero: whether a line marks zero.
        from_zero: whether it begins there.
    """

    title: str
    logarithmic: bool = False
    span: tuple[float, float] | None = None
    ticks: tuple[tuple[float, str], ...] | None = None
    zero: bool = False
    from_zero: bool = False

    @classmethod
    def log(cls, title: str, values: Sequence[float], margin: float = 0.05) -> "Axis":
        """Return a logarithmic axis that covers the values."""
        if not values:
            return cls(title, True)
        low, high = min(values), max(values)
        edge = (high / low) ** margin if high > low else 1.5
        span = (low / edge, high * edge)
        return cls(title, True, span, tuple((tick, short(tick)) for tick in log_ticks(*span)))


@dataclasses.dataclass(frozen=True)
class Line:
    """Points that belong together.

    Attributes:
        label: whose they are: what the key hides and shows.
        style: how they are drawn.
        x: places.
        y: values; None leaves a gap.
        hover: what is said about each point.
        joined: whether a line leads from point to point.
        texts: written beside the points; None: nothing.
        ringed: whether the points are marked by a ring.
    """

    label: str
    style: Style
    x: Sequence[float]
    y: Sequence[float | None]
    hover: Sequence[str]
    joined: bool = True
    texts: Sequence[str] | None = None
    ringed: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """A figure: lines, and two axes."""

    lines: list[Line]
    x: Axis
    y: Axis


# -- what is drawn -------------------------------------------------------------------------------------------------


def curve_chart(comparison: Comparison, axis: str) -> Chart:
    """Draw validation perplexity, on a log scale, against ``seconds`` or ``tokens``."""
    lines = []
    for row in comparison.rows:
        for run in row.runs:
            hover = [
                f"seed {run.seed}<br>perplexity {wording.perplexity(point['perplexity'])}<br>"
                f"{wording.duration(point['seconds'])}, {wording.count(point['tokens'])} tokens"
                for point in run.curve
            ]
            places, values = [[point[name] for point in run.curve] for name in (axis, "perplexity")]
            ends = ["", "diverged"] if run.diverged else ["", ""]
            texts = [ends[place == len(places) - 1] for place in range(len(places))] if run.diverged else None
            lines.append(Line(row.label, row.style, places, values, hover, texts=texts))
    titles = {"seconds": "training time, seconds, without evaluations", "tokens": "training tokens"}
    span = perplexity_span(comparison)
    y = Axis.log("validation perplexity", list(span), 0) if span else Axis("validation perplexity", True)
    return Chart(lines, Axis(titles[axis], from_zero=True), y)


def perplexity_span(comparison: Comparison) -> tuple[float, float] | None:
    """Return what the axis of the curves shows: all of them, short of a divergence; None where there is none."""
    values = [point["perplexity"] for run in comparison.runs for point in run.curve]
    if not values:
        return None
    low, high = min(values), max(values)
    if comparison.unigram:
        high = max(low, min(high, 2 * comparison.unigram["valid"]))
    margin = (high / low) ** 0.05 if high > low else 1.5
    return low / margin, high * margin


def frontier_chart(comparison: Comparison, cost: str) -> Chart:
    """Draw test perplexity against ``seconds`` or ``memory``: a point for each run, a ring where nothing is better."""
    in_time = comparison.setting.in_time
    prices = {
        "seconds": (
            (lambda run: 1e6 / run.result["train"]["tokens_per_second"])
            if in_time
            else (lambda run: run.result["train"]["seconds"])
        ),
        "memory": lambda run: run.result["memory"]["peak_bytes"] / 1e6,
    }
    price = prices[cost]

    def height(run: Run) -> float:
        value = comparison.ranking.value(run)
        return math.inf if value is None else value

    best = comparison.frontier(comparison.seconds if cost == "seconds" else comparison.memory)
    runs = [run for row in comparison.finished for run in row.finished if math.isfinite(height(run))]
    lines = []
    if len(best) > 1 and all(price(run) for row in best for run in row.finished):
        means = [mean_of([price(run) for run in row.finished]) for row in best]
        x, y = _staircase(means, list(map(comparison.level, best)))
        lines.append(Line("", Style("soft", "#5a6068", "circle", "dot"), x, y, [""] * len(x)))
    for row in comparison.finished:
        own = [run for run in row.finished if math.isfinite(height(run)) and price(run)]
        hover = [
            f"perplexity {wording.perplexity(height(run))}<br>{wording.duration(run.result['train']['seconds'])}, "
            f"{wording.count(run.result['train']['tokens'])} tokens, "
            f"{wording.whole(run.result['train']['tokens_per_second'])} tokens/s<br>"
            f"{wording.megabytes(run.result['memory']['peak_bytes'])}<br>{run.name}"
            for run in own
        ]
        lines.append(Line(
            row.label, row.style, [price(run) for run in own], list(map(height, own)), hover, joined=False,
            ringed=row in best,
        ))  # fmt: skip
    titles = {
        "seconds": "seconds of training for a million tokens" if in_time else "training time, seconds",
        "memory": "peak memory, MB",
    }
    x_axis = Axis.log(titles[cost], [price(run) for run in runs if price(run)], 0.08)
    return Chart(lines, x_axis, Axis.log(comparison.ranking.heading.lower(), list(map(height, runs)), 0.08))


def band_chart(bands: Bands) -> Chart:
    """Draw the loss by frequency band."""
    what = "nats above full softmax" if bands.relative else "nats per token"
    places = list(range(len(bands.labels)))
    lines = [
        Line(
            row.label, row.style, places,
            [loss if loss is not None and math.isfinite(loss) else None for loss in losses],
            [f"words {label}<br>{'none' if loss is None else wording.nats(loss, relative=bands.relative)} {what}"
             for label, loss in zip(bands.labels, losses, strict=True)],
        )
        for row, losses in bands.rows
    ]  # fmt: skip
    ticks = [f"{label}<br>{wording.share(part)}" for label, part in zip(bands.labels, bands.shares, strict=True)]
    x_axis = Axis(
        "rank of the word, share of the tokens", span=(-0.25, len(places) - 0.75),
        ticks=tuple(zip(places, ticks, strict=True)),
    )  # fmt: skip
    return Chart(lines, x_axis, Axis(what, zero=bands.relative))


def sweep_chart(sweep: Sweep) -> Chart:
    """Draw test perplexity against the number of drawn words, with full softmax as a level."""
    lines, values = [], []
    numbers = sorted({number for line in sweep.lines for number, _ in line.points})
    full, level = sweep.comparison.reference, sweep.comparison.level
    if full and math.isfinite(level(full)):
        text = f"perplexity {wording.perplexity(level(full))}"
        lines.append(Line(full.label, OF_REFERENCE, [numbers[0], numbers[-1]], [level(full)] * 2, [text] * 2))
        values.append(level(full))
    for line in sweep.lines:
        points = [(number, level(row)) for number, row in line.points if math.isfinite(level(row))]
        hover = [f"{number:,} words drawn<br>perplexity {wording.perplexity(height)}" for number, height in points]
        heights = [height for _, height in points]
        lines.append(Line(line.label, line.style, [number for number, _ in points], heights, hover))
        values += heights
    x_axis = Axis.log("words drawn, K", numbers)
    return Chart(lines, x_axis, Axis.log(sweep.comparison.ranking.heading.lower(), values))


MEASURES = {
    "seconds": ("Time of a step", "milliseconds", 1e3, wording.milliseconds),
    "memory": ("Memory", "MB", 1e-6, wording.megabytes),
    "flops": ("FLOPs", "GFLOP", 1e-9, wording.large),
}
"""Of the growth with V: name, unit of the axis, what makes it that unit, and the form for people."""


def scaling_chart(scaling: Scaling, measure: str, looks: Mapping[str, Style]) -> Chart:
    """Draw what a step takes against the size of the vocabulary, both on log scales."""
    title, unit, factor, show = MEASURES[measure]
    lines, values = [], []
    for growth in scaling.growths:
        points = [(point.vocab, getattr(point, measure)) for point in growth.points if getattr(point, measure)]
        power = growth.power(measure)
        law = f"<br>grows as V to the power of {power.exponent:.2f}" if power else ""
        hover = [f"V {vocab:,}<br>{show(value)}{law}" for vocab, value in points]
        heights = [factor * value for _, value in points]
        lines.append(Line(growth.label, looks[growth.label], [vocab for vocab, _ in points], heights, hover))
        values += heights
    vocabs = scaling.vocabs
    x_axis = Axis("V, words in the vocabulary", True, (vocabs[0] / 1.2, vocabs[-1] * 1.2),
                  tuple((vocab, short(vocab)) for vocab in vocabs))  # fmt: skip
    return Chart(lines, x_axis, Axis.log(f"{title.lower()}, {unit}", values))


def mean_of(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return math.fsum(values) / len(values)


def _staircase(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the border of what is reached: at each cost the best perplexity so far."""
    xs, ys = [x[0]], [y[0]]
    for place, value in zip(x[1:], y[1:], strict=True):
        xs += [place, place]
        ys += [ys[-1], value]
    return xs, ys


# -- how it is drawn -----------------------------------------------------------------------------------------------


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers that cover ``[low, high]`` on a log scale, about four to nine of them."""
    ticks: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
        ticks = [round(step * 10.0**decade, 6) for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            return ticks[:: max(1, len(ticks) // 8)]
    if high <= low:
        return [low]
    # Over less than a decade even steps are rounder than even ratios.
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * (1 - 1e-9))
    return [round(number * step, 9) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def short(tick: float) -> str:
    """Return the text of a tick."""
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if tick >= size:
            return f"{tick / size:,.6g}\u00a0{unit}"
    return f"{tick:,.6g}"


def to_plotly(chart: Chart) -> dict[str, Any]:
    """Return a chart as Plotly takes it."""
    traces = []
    for line in chart.lines:
        colour = f"@{line.style.key}"
        trace: dict[str, Any] = {
            "type": "scatter",
            "mode": ("lines+markers" if line.joined else "markers") + ("+text" if line.texts else ""),
            "meta": line.label,
            "x": list(line.x),
            "y": list(line.y),
            "customdata": list(line.hover),
            "hovertemplate": "<b>%{meta}</b><br>%{customdata}<extra></extra>",
            "line": {"color": colour, "width": 2, "dash": line.style.dash},
            "marker": {"symbol": line.style.marker, "size": 7, "color": colour},
        }
        if not line.label:  # a guide for the eye
            trace |= {"mode": "lines", "hoverinfo": "skip"}
            trace["line"]["width"] = 1.5
            del trace["hovertemplate"], trace["marker"], trace["customdata"]
        if not line.joined:
            trace["marker"] |= {"size": 10 if line.ringed else 8, "opacity": 0.85}
        if line.ringed:
            trace["marker"]["line"] = {"color": "@ink", "width": 1.8}
        if line.texts:
            trace |= {"text": list(line.texts), "textposition": "top left"}
        traces.append(trace)
    layout = LAYOUT | {"xaxis": _plotly_axis(chart.x), "yaxis": _plotly_axis(chart.y)}
    return {"data": traces, "layout": layout}


def _plotly_axis(axis: Axis) -> dict[str, Any]:
    found: dict[str, Any] = AXIS | {"title": {"text": axis.title}}
    if axis.logarithmic:
        found["type"] = "log"
    if axis.span:
        found["range"] = [math.log10(end) for end in axis.span] if axis.logarithmic else list(axis.span)
    if axis.ticks is not None:
        values, texts = zip(*axis.ticks, strict=True) if axis.ticks else ((), ())
        found |= {"tickvals": list(values), "ticktext": list(texts)}
    if any("<br>" in text for _, text in axis.ticks or ()):
        found["showgrid"] = False
    if axis.zero:
        found |= {"zeroline": True, "zerolinecolor": "@rule", "zerolinewidth": 1.5}
    if axis.from_zero:
        found["rangemode"] = "tozero"
    return found


def shown_first(comparisons: Sequence[Comparison], limit: int = 12) -> set[str]:
    """Return the layers that figures show at first: all of a few; of many full softmax, the frontiers and the best."""
    rows: dict[str, Row] = {row.label: row for comparison in comparisons for row in comparison.rows}
    if len(rows) <= limit:
        return set(rows)
    chosen: set[str] = set()
    for comparison in comparisons:
        first = [comparison.reference] if comparison.reference else []
        first += comparison.frontier(comparison.seconds) + comparison.finished[:5]
        chosen |= {row.label for row in first[:limit]}
    return chosen
