"""Figures for documents, drawn by Matplotlib: what :mod:`experiments.drawing` describes, as SVG and PDF.

A PDF holds the part of its font that it uses, as journals want it. To cut that part out of a whole font takes longer
than to draw the figure, so the whole font is cut down once, to the characters that figures are made of.
"""

import atexit
import functools
import io
import itertools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure
from fontTools import subset
from matplotlib import font_manager

from experiments.drawing import Axis, Chart, short

MATPLOTLIB = {
    "circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "triangle-down": "v", "pentagon": "p", "x": "X",
    "solid": "-", "dash": "--", "dot": ":", "dashdot": "-.",
}  # fmt: skip


def to_files(chart: Chart) -> dict[str, bytes]:
    """Draw a chart for documents, as ``svg`` and ``pdf``; the same chart gives the same bytes."""
    settings = {
        "svg.hashsalt": "lvsoftmax", "font.family": [_small_font(), "DejaVu Sans"], "font.size": 9, "pdf.fonttype": 42,
        "axes.edgecolor": "#8a9098", "axes.linewidth": 0.8,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        labels = dict.fromkeys(line.label for line in chart.lines if line.label)
        columns = 1 + (len(labels) - 1) // 16
        # Fixed margins: to work them out would take longer than all the drawing.
        width, height = 4.9, 3.2
        key = (0.6 + 0.056 * max(map(len, labels), default=0)) * columns
        figure = matplotlib.figure.Figure(figsize=(width + key, height))
        axes = figure.add_axes((0.75 / (width + key), 0.19, (width - 0.85) / (width + key), 0.77))
        named: set[str] = set()
        for line in chart.lines:
            kept = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None]
            xs, ys = ([place[part] for place in kept] for part in (0, 1))
            style = {"color": line.style.colour, "markersize": 5 if not line.joined else 3.5, "linewidth": 1.4}
            style["linestyle"] = MATPLOTLIB[line.style.dash] if line.joined else "none"
            if line.label:
                style["marker"] = MATPLOTLIB[line.style.marker]
                style["label"] = None if line.label in named else line.label
                style["markevery"] = 1 + len(xs) // 9
            if line.ringed:
                style |= {"markeredgecolor": "#1a1a1a", "markeredgewidth": 1.1}
            axes.plot(xs, ys, **style)
            named.add(line.label)
        axes.set(xlabel=chart.x.title, ylabel=chart.y.title)
        _dress(axes.xaxis, chart.x, axes.set_xscale, axes.set_xlim)
        _dress(axes.yaxis, chart.y, axes.set_yscale, axes.set_ylim)
        if chart.y.zero:
            axes.axhline(0, color="#8a9098", linewidth=0.8)
        if labels:
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, ncols=columns, fontsize=7.5)
        axes.grid(color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        found = {}
        for kind, dates in (("svg", {"Date": None}), ("pdf", {"CreationDate": None})):
            stream = io.BytesIO()
            figure.savefig(stream, format=kind, metadata=dates)
            found[kind] = stream.getvalue()
    return found


def _dress(ruler: Any, axis: Axis, set_scale: Any, set_limits: Any) -> None:
    if axis.logarithmic:
        set_scale("log")
    if axis.ticks is not None:
        ruler.set_ticks([value for value, _ in axis.ticks], [text.replace("<br>", "\n") for _, text in axis.ticks])
        ruler.set_ticks([], minor=True)
        if any("<br>" in text for _, text in axis.ticks):
            ruler.set_tick_params(labelsize=7)
    elif axis.from_zero:
        ruler.set_major_formatter(lambda value, _: short(value))
    if axis.span:
        set_limits(axis.span)
    elif axis.from_zero:
        set_limits(0, None)


@functools.cache
def _small_font() -> str:
    """Return the family of Matplotlib's sans-serif font, cut down to western letters, Greek and signs."""
    family = "Small DejaVu Sans"
    folder = tempfile.mkdtemp()  # what is there is read whenever a figure is drawn
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "font.ttf"
    options = subset.Options(layout_features=["kern"], drop_tables=["FFTM", "GDEF", "GSUB", "MATH"])
    blocks = range(0x20, 0x180), range(0x370, 0x400), range(0x2000, 0x20D0), range(0x2190, 0x2300)
    with subset.load_font(font_manager.findfont("DejaVu Sans"), options) as font:
        cutter = subset.Subsetter(options)
        cutter.populate(unicodes=itertools.chain(*blocks))
        cutter.subset(font)
        for record in font["name"].names:
            if record.nameID in (1, 4, 6):  # the family's, the font's and PostScript's
                record.string = "SmallDejaVuSans" if record.nameID == 6 else family
        subset.save_font(font, str(path), options)
    font_manager.fontManager.addfont(path)
    return family
