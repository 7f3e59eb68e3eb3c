"""The pictures of the gallery: each draws what functions of ``lvsoftmax.ops`` return, on a Matplotlib figure.

A picture takes its colours by the names of the style sheet's variables, from whoever draws it.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial

import matplotlib.figure
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from torch import Tensor

from lvsoftmax.ops.gumbel import gumbel_softmax
from lvsoftmax.ops.normalisers import Exponential, Sigmoidal, Spherical, Taylor, divide_by_sum
from lvsoftmax.ops.online import merge, running
from lvsoftmax.ops.softmax import softmax
from lvsoftmax.ops.sparse import entmax15, sparsemax

COLOURS = ("ink", "soft", "rule", "grid", "paper", "layer-0", "layer-1", "layer-2", "layer-3")
CLASSES = ("#0072b2", "#d55e00", "#009e73")  # of three classes where they are mixed, which variables cannot be

Colours = Mapping[str, str]
Figure = matplotlib.figure.Figure

SCORES = torch.tensor([2.0, 4.0, 2.0, 1.0])


def shares(colours: Colours) -> Figure:
    """Softmax, argmax and division by the sum, of the same scores moved, stretched and partly negative."""
    rows = {
        "four scores": SCORES,
        "10 added to each": SCORES + 10,
        "each times 3": 3 * SCORES,
        "some negative": torch.tensor([-0.25, 1.0, -0.75]),
    }
    columns = {"softmax": softmax, "argmax": partial(softmax, temperature=0.0), "divided by their sum": divide_by_sum}
    figure = _figure(6.2)
    grid = figure.subplots(len(rows), 1 + len(columns), width_ratios=[1.15, 1, 1, 1])
    for (label, scores), line in zip(rows.items(), grid, strict=True):
        _bars(line[0], scores, colours, "{:g}".format, limits=_span(scores))
        line[0].set_ylabel(label, color=colours["ink"], rotation=0, ha="right", va="center", labelpad=10)
        for axes, function in zip(line[1:], columns.values(), strict=True):
            try:
                _bars(axes, function(scores), colours, partial(_share, decimals=3))
            except ValueError as error:
                reason = str(error).split(":")[0].replace("-", "−")
                _empty(axes)
                axes.text(0.5, 0.5, f"no answer:\n{reason}", ha="center", va="center", color=colours["soft"])
    for axes, title in zip(grid[0], ("scores", *columns), strict=True):
        axes.set_title(title, color=colours["ink"], fontweight="bold")
    return figure


def temperatures(colours: Colours) -> Figure:
    """Shares against one over the temperature: argmin, uniform, argmax, and all there is between them."""
    stops = (-0.0, -0.5, -1.0, math.inf, 1.0, 0.5, 0.0)
    names = ("T = −0", "T = −0.5", "T = −1", "T = ±∞", "T = 1", "T = 0.5", "T = 0")
    words = ("argmin", "", "", "all equal", "softmax", "", "argmax")
    figure = _figure(5.4)
    layout = figure.add_gridspec(2, len(stops), height_ratios=[1, 1.8])
    for column, (temperature, name, word) in enumerate(zip(stops, names, words, strict=True)):
        axes = figure.add_subplot(layout[0, column])
        _bars(axes, softmax(SCORES, temperature=temperature), colours, partial(_share, decimals=2))
        axes.set_title(f"{name}\n{word}", color=colours["ink"], fontweight="bold" if word else "normal")
    axes = figure.add_subplot(layout[1, :])
    colds = torch.linspace(-3, 3, 301)
    table = torch.stack([softmax(SCORES, temperature=1 / cold if cold else math.inf) for cold in colds.tolist()])
    axes.stackplot(colds, *table.T, colors=_class_colours(colours), edgecolor=colours["paper"], linewidth=1)
    middle = table.cumsum(1) - table / 2
    for index, (score, place) in enumerate(zip(SCORES.tolist(), (-1.6, 1.6, -1.6, -1.6), strict=True)):
        height = middle[(colds - place).abs().argmin(), index]
        axes.text(place, height, f"{score:g}", ha="center", va="center", color=colours["paper"], fontweight="bold")
    ticks = {-3: "−⅓", -2: "−½", -1: "−1", 0: "±∞", 1: "1", 2: "½", 3: "⅓"}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set(xlim=(-3, 3), ylim=(0, 1), yticks=[0, 0.5, 1])
    axes.set_xlabel("temperature T, drawn evenly in 1 / T", color=colours["soft"])
    axes.set_ylabel("share", color=colours["soft"])
    _dress(axes, colours, grid=False)
    return figure


def corners(colours: Colours) -> Figure:
    """Two nearly equal pairs that part as the temperature falls."""
    figure = _figure(2.9)
    axes = figure.subplots()
    axis = torch.logspace(0, -6, 241, dtype=torch.float64)
    for other, colour, end in ((0.9999, "layer-0", 1.0), (1.0001, "layer-1", 0.0)):
        pair = torch.tensor([1.0, other], dtype=torch.float64)
        first = [softmax(pair, temperature=temperature)[0].item() for temperature in axis.tolist()]
        axes.plot(axis, first, color=colours[colour], linewidth=2.2)
        axes.text(1.6e-6, end + (0.5 - end) * 0.16, f"(1, {other})", color=colours[colour], ha="right", va="center")
    axes.set(xscale="log", xlim=(1, 1e-6), ylim=(-0.04, 1.04), yticks=[0, 0.5, 1])
    axes.xaxis.set_major_formatter(_plain)
    axes.set_xlabel("temperature", color=colours["soft"])
    axes.set_ylabel("share of the first score", color=colours["soft"])
    _dress(axes, colours)
    return figure


def weights(colours: Colours) -> Figure:
    """The weight of a score under four normalisers, and its slope on the logarithmic scale."""
    kinds = {
        "softmax: exp(s)": (Exponential(), "layer-0", "-"),
        "sigsoftmax: exp(s) sigmoid(s)": (Sigmoidal(), "layer-1", "--"),
        "Taylor: 1 + s + s²/2": (Taylor(), "layer-2", "-."),
        "spherical: s² + 0.1": (Spherical(0.1), "layer-3", ":"),
    }
    figure = _figure(3.6)
    left, right = figure.subplots(1, 2)
    axis = torch.linspace(-6, 6, 481)
    for label, (normaliser, colour, dash) in kinds.items():
        style = {"color": colours[colour], "linestyle": dash, "linewidth": 2.2}
        left.plot(axis, normaliser.log_weight(axis).exp(), label=label, **style)
        right.plot(axis, normaliser.slope(axis), **style)
    left.set(yscale="log", ylim=(1e-4, 1e3), xlim=(-6, 6))
    left.yaxis.set_major_formatter(_plain)
    right.set(xlim=(-6, 6))
    left.set_title("weight f(s) of a score s", color=colours["ink"])
    right.set_title("how fast log f(s) rises", color=colours["ink"])
    for axes in (left, right):
        axes.set_xlabel("score s", color=colours["soft"])
        _dress(axes, colours)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=colours["ink"], handlelength=3)
    return figure


def sparse(colours: Colours) -> Figure:
    """Four maps from scores to the simplex: where each class wins, and what becomes of a net in the plane of scores."""
    maps: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": softmax,
        "1.5-entmax": entmax15,
        "sparsemax": sparsemax,
        "argmax": partial(softmax, temperature=0.0),
    }
    figure = _figure(5.1)
    grid = figure.subplots(2, len(maps), height_ratios=[1, 0.87])
    reach = 2.4
    axis, net = torch.linspace(-reach, reach, 241), torch.arange(-6, 7) * (reach / 6)  # with zero itself: ties
    mixed = torch.tensor([to_rgb(colour) for colour in CLASSES])
    for (name, function), (plane, simplex) in zip(maps.items(), grid.T, strict=True):
        p = function(_plane(axis, axis))
        image = (p @ mixed).clamp(0, 1).numpy()
        extent = (-reach, reach, -reach, reach)
        plane.imshow(image, origin="lower", extent=extent, interpolation="bilinear")
        if name in ("1.5-entmax", "sparsemax"):
            support = (p > 0).sum(-1).numpy()
            plane.contour(axis, axis, support, levels=[1.5, 2.5], colors="white", linewidths=1.4)
            for a, b in ((0, 0), (1.8, 1.8), (-2.2, 0), (0, -2.2), (-1.2, 2.2), (2.2, -1.2), (-2.2, -2.2)):
                count = (function(torch.tensor([a, b, 0.0])) > 0).sum().item()
                plane.text(a, b, count, ha="center", va="center", color="white", fontweight="bold")
        plane.set_title(name, color=colours["ink"], fontweight="bold")
        plane.set(xticks=[-2, 0, 2], yticks=[-2, 0, 2])
        _dress(plane, colours, grid=False)
        _simplex(simplex, colours)
        if name != "argmax":  # which jumps: its lines would be nowhere
            for family, colour in ((function(_plane(net, axis)).transpose(0, 1), 0), (function(_plane(axis, net)), 1)):
                for line in family:
                    place = _on_simplex(line)
                    simplex.plot(*place, color=colours[f"layer-{colour}"], linewidth=0.8, alpha=0.75, clip_on=False)
        knots = _on_simplex(function(_plane(net, net)).reshape(-1, 3))
        simplex.plot(*knots, ".", color=colours["ink"], markersize=3, clip_on=False)
    grid[0, 0].set_ylabel("score of b", color=colours["soft"])
    grid[0, 0].set_xlabel("score of a", color=colours["soft"])
    return figure


def gumbel(colours: Colours) -> Figure:
    """Soft draws on the simplex at four temperatures."""
    figure = _figure(2.6)
    p = torch.tensor([0.5, 0.3, 0.2])
    for axes, temperature in zip(figure.subplots(1, 4), (0.1, 0.5, 1.0, 4.0), strict=True):
        generator = torch.Generator().manual_seed(1)
        draws = gumbel_softmax(p.log().expand(600, -1), temperature, generator=generator)
        _simplex(axes, colours)
        for index in range(3):
            chosen = draws[draws.argmax(1) == index]
            axes.plot(*_on_simplex(chosen), ".", color=colours[f"layer-{index}"], markersize=3, alpha=0.6, mew=0)
        axes.set_title(f"T = {temperature:g}", color=colours["ink"], fontweight="bold")
    return figure


def online(colours: Colours) -> Figure:
    """The running maximum and sum over a stream, and the log-sum-exp they stand for."""
    generator = torch.Generator().manual_seed(7)
    numbers = torch.randn(48, generator=generator, dtype=torch.float64) + torch.linspace(0, 4, 48).sin() * 2.5
    pairs = itertools.accumulate((running(number[None]) for number in numbers), merge)
    maximum, total, so_far = (
        torch.stack(column).numpy() for column in zip(*((*pair, pair.logsumexp()) for pair in pairs), strict=True)
    )
    at_once, step = numbers.logsumexp(0).item(), np.arange(1, len(numbers) + 1)
    figure = _figure(5.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.5, 1])
    top.plot(step, numbers.numpy(), "o", color=colours["soft"], markersize=4)
    top.step(step, maximum, where="post", color=colours["layer-0"], linewidth=2.2)
    top.plot(step, so_far, color=colours["layer-1"], linewidth=2.2)
    top.axhline(at_once, color=colours["ink"], linestyle=":", linewidth=1.4)
    for text, height, anchor, colour in (
        ("log-sum-exp of all numbers at once", at_once + 0.15, "bottom", "ink"),
        ("m + log s: the log-sum-exp so far", at_once - 0.25, "top", "layer-1"),
        ("m: the largest so far", maximum[-1] + 0.12, "bottom", "layer-0"),
    ):
        top.text(48, height, text, ha="right", va=anchor, color=colours[colour])
    bottom.bar(step, total, color=colours["layer-2"], width=0.7)
    for rise in step[1:][np.diff(maximum) > 0]:
        for axes in (top, bottom):
            axes.axvline(rise, color=colours["rule"], linewidth=0.9, zorder=0)
    bottom.set_ylabel("s: sum of exp(x − m)", color=colours["soft"])
    top.set_ylabel("numbers as they come", color=colours["soft"])
    bottom.set_xlabel("numbers seen", color=colours["soft"])
    top.set(xlim=(0.3, 48.7), ylim=(None, at_once + 0.9))
    for axes in (top, bottom):
        _dress(axes, colours)
    return figure


def _plain(value: float, _: int) -> str:
    return f"{value:,.7f}".rstrip("0").rstrip(".")


def _figure(height: float) -> Figure:
    return matplotlib.figure.Figure(figsize=(10, height), layout="constrained")


def _class_colours(colours: Colours) -> list[str]:
    return [colours[f"layer-{index}"] for index in range(4)]


def _bars(
    axes: Axes,
    values: Tensor,
    colours: Colours,
    show: Callable[[float], str],
    limits: tuple[float, float] = (0, 1.2),
) -> None:
    """Draw numbers as labelled bars on a baseline."""
    numbers = values.tolist()
    axes.bar(range(len(numbers)), numbers, color=_class_colours(colours)[: len(numbers)], width=0.72)
    lift = 0.03 * (limits[1] - limits[0])
    for place, number in enumerate(numbers):
        height, anchor = (number - lift, "top") if number < 0 else (number + lift, "bottom")
        text = show(number).replace("-", "−")
        axes.text(place, height, text, ha="center", va=anchor, color=colours["ink"], fontsize=7.5)
    axes.axhline(0, color=colours["rule"], linewidth=1)
    axes.set(ylim=limits, xlim=(-0.6, 3.6))
    _empty(axes)


def _share(number: float, decimals: int) -> str:
    """Tell zero from what is only rounded to it."""
    if number in (0, 1):
        return f"{number:g}"
    text = f"{number:.{decimals}f}"
    return text if float(text) > 0 else f"<{10**-decimals:g}"


def _span(values: Tensor) -> tuple[float, float]:
    low, high = min(0.0, values.min().item()), values.max().item()
    return (1.35 * low, low + 1.2 * (high - low))


def _empty(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[], facecolor="none")
    axes.spines[:].set_visible(False)


def _dress(axes: Axes, colours: Colours, *, grid: bool = True) -> None:
    axes.tick_params(which="both", colors=colours["soft"], length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(colours["rule"])
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    if grid:
        axes.grid(color=colours["grid"], linewidth=0.8)


def _plane(a: Tensor, b: Tensor) -> Tensor:
    """Return scores ``[len(b), len(a), 3]`` of the classes a, b and c, the last of which is 0."""
    grid_b, grid_a = torch.meshgrid(b, a, indexing="ij")
    return torch.stack([grid_a, grid_b, torch.zeros_like(grid_a)], -1)


def _on_simplex(p: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return where distributions over a, b, c lie in the triangle: a to the left, b to the right, c on top."""
    return (p[..., 1] + p[..., 2] / 2).numpy(), (p[..., 2] * math.sqrt(3) / 2).numpy()


def _simplex(axes: Axes, colours: Colours) -> None:
    corners = torch.eye(3)[[0, 1, 2, 0]]
    axes.plot(*_on_simplex(corners), color=colours["rule"], linewidth=1.2, zorder=0)
    for name, corner, anchor, colour in zip("abc", corners, ("right", "left", "center"), range(3), strict=False):
        x, y = _on_simplex(corner)
        shift = {"right": (-0.03, -0.02), "left": (0.03, -0.02), "center": (0, 0.03)}[anchor]
        style = {"ha": anchor, "va": "bottom" if anchor == "center" else "center", "fontweight": "bold"}
        axes.text(x + shift[0], y + shift[1], name, color=colours[f"layer-{colour}"], **style)
    axes.set(aspect="equal", xlim=(-0.1, 1.1), ylim=(-0.08, 0.98))
    _empty(axes)
