"""The figures: Plotly's for the page, Matplotlib's for documents.

Plotly's are its own dictionaries. A colour "@name" stands for the style sheet's variable --name, so that the page can
follow the reader's light or dark setting.
"""

import io
import math
from typing import Any

import matplotlib
import matplotlib.figure

from experiments import wording
from experiments.comparison import Bands, Comparison, Row

MATPLOTLIB = {
    "circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "triangle-down": "v", "pentagon": "p", "x": "X",
    "solid": "-", "dash": "--", "dot": ":", "dashdot": "-.",
}  # fmt: skip

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
            values = [point["perplexity"] for point in run.curve]
            places = [point[axis] for point in run.curve]
            details = [
                [run.seed, wording.perplexity(point["perplexity"]), wording.duration(point["seconds"]),
                 wording.count(point["tokens"])]
                for point in run.curve
            ]  # fmt: skip
            hover = "seed %{customdata[0]}<br>perplexity %{customdata[1]}<br>%{customdata[2]}, %{customdata[3]} tokens"
            traces.append(_line(row, places, values, details, hover))
            if run.diverged and run.curve:
                end = {"x": places[-1:], "y": values[-1:], "mode": "text", "text": ["diverged"], "hoverinfo": "skip"}
                traces.append({"type": "scatter", "meta": row.label, "textposition": "top right"} | end)
    x_axis = AXIS | {"title": {"text": f"training {axis}"}, "rangemode": "tozero"}
    y_axis = AXIS | {"title": {"text": "validation perplexity"}, "type": "log"}
    if span := perplexity_span(comparison):
        ticks = log_ticks(*span)
        texts = [f"{tick:,.6g}" for tick in ticks]
        y_axis |= {"range": [math.log10(end) for end in span], "tickvals": ticks, "ticktext": texts}
    return {"data": traces, "layout": LAYOUT | {"xaxis": x_axis, "yaxis": y_axis}}


def band_figure(bands: Bands) -> dict[str, Any]:
    """Draw the loss by frequency band."""
    what = "nats per token above full softmax" if bands.relative else "nats per token"
    places = list(range(len(bands.labels)))
    hover = (
        f"words %{{customdata}}<br>%{{y:+.3f}} {what}"
        if bands.relative
        else f"words %{{customdata}}<br>%{{y:.3f}} {what}"
    )
    traces = [
        _line(
            row,
            places,
            [loss if loss is not None and math.isfinite(loss) else None for loss in losses],
            bands.labels,
            hover,
        )
        for row, losses in bands.rows
    ]
    x_axis = AXIS | {
        "title": {"text": "rank of the word to predict, and share of the test tokens"},
        "tickvals": places,
        "ticktext": [
            f"{label}<br>{wording.share(part)}" for label, part in zip(bands.labels, bands.shares, strict=True)
        ],
        "showgrid": False,
        "range": [-0.25, len(places) - 0.75],
    }
    zero = {"zeroline": bands.relative, "zerolinecolor": "@rule", "zerolinewidth": 1.5}
    return {"data": traces, "layout": LAYOUT | {"xaxis": x_axis, "yaxis": AXIS | zero | {"title": {"text": what}}}}


def _line(row: Row, places: list, values: list, details: list, hover: str) -> dict[str, Any]:
    colour = f"@{row.style.key}"
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "meta": row.label,
        "x": places,
        "y": values,
        "customdata": details,
        "hovertemplate": f"<b>%{{meta}}</b><br>{hover}<extra></extra>",
        "line": {"color": colour, "width": 2, "dash": row.style.dash},
        "marker": {"symbol": row.style.marker, "size": 7, "color": colour},
    }


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


def still_figure(comparison: Comparison) -> str:
    """Draw validation perplexity against training time as an SVG for documents."""
    with matplotlib.rc_context({"svg.hashsalt": "lvsoftmax", "font.family": "sans-serif", "font.size": 10}):
        figure = matplotlib.figure.Figure(figsize=(8, 4.2), layout="constrained")
        axes = figure.subplots()
        for row in comparison.rows:
            for index, run in enumerate(row.runs):
                label = f"{row.label}{f' ({row.note})' if row.note else ''}" if index == 0 else None
                axes.plot(
                    [point["seconds"] for point in run.curve],
                    [point["perplexity"] for point in run.curve],
                    color=row.style.colour,
                    linestyle=MATPLOTLIB[row.style.dash],
                    marker=MATPLOTLIB[row.style.marker],
                    markersize=3.5,
                    linewidth=1.6,
                    label=label,
                )
        axes.set(xlabel="training seconds", ylabel="validation perplexity", yscale="log", xlim=(0, None))
        if span := perplexity_span(comparison):
            ticks = log_ticks(*span)
            axes.set_yticks(ticks, [f"{tick:,.6g}" for tick in ticks])
            axes.set_yticks([], minor=True)
            axes.set_ylim(span)
            figure.legend(loc="outside right upper", frameon=False)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()
