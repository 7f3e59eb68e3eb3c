"""A comparison broken down: by how frequent the predicted word is, and by the number of drawn words."""

import dataclasses
import json
import re

from experiments.comparison import Column, Comparison, Row
from experiments.reading import Run
from experiments.setting import options
from experiments.style import Style, styles


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
        reference = _framed(comparison.reference, frame) if comparison.reference else []
        rows = []
        for row in comparison.finished:
            runs = _framed(row, frame)
            losses = []
            for index in range(len(frame)):
                column = Column(
                    "", "", str, lambda run, index=index: run.result["test"]["bands"][index]["nll"],
                    relative=bool(reference), same_machine=comparison.setting.in_time,
                )  # fmt: skip
                spread = column.over(runs, reference)
                losses.append(spread.mean if spread else None)
            rows.append((row, losses))
        total = sum(tokens for *_, tokens in frame) or 1
        labels = [f"{first + 1:,}" if first == last else f"{first + 1:,}–{last + 1:,}" for first, last, _ in frame]
        return cls(labels, [tokens / total for *_, tokens in frame], bool(reference), rows)


def _framed(row: Row, frame: list[tuple[int, int, int]]) -> list[Run]:
    """Return the finished runs whose bands are those."""
    return [run for run in row.finished if _frame(run) == frame]


def _frame(run: Run) -> list[tuple[int, int, int]]:
    return [(band["first"], band["last"], band["tokens"]) for band in run.result["test"]["bands"]]


@dataclasses.dataclass(frozen=True)
class Draws:
    """A layer and a noise distribution with several numbers of drawn words.

    Attributes:
        label: layer and noise.
        points: number of words, and the row of it, in ascending order.
        style: how it is drawn.
    """

    label: str
    points: list[tuple[int, Row]]
    style: Style


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Perplexity against the number of drawn words, under one setting."""

    comparison: Comparison
    lines: list[Draws]

    @classmethod
    def of(cls, comparison: Comparison) -> "Sweep | None":
        """Find layers that differ in nothing but ``samples``; None where there are none."""
        groups: dict[tuple[str, str], list[tuple[int, Row]]] = {}
        names: dict[tuple[str, str], str] = {}
        for row in comparison.finished:
            run = row.finished[0]
            if run.samples is not None:
                rest = {key: value for key, value in options(run).items() if key != "samples"}
                key = (run.layer, json.dumps(rest, sort_keys=True))
                groups.setdefault(key, []).append((run.samples, row))
                name = [option for option in re.findall(r"[\w.]+=[^,)]+", row.label) if "samples=" not in option]
                names[key] = run.layer.replace("_", " ").capitalize() + (f" ({', '.join(name)})" if name else "")
        found = {key: sorted(points, key=lambda point: (point[0], point[1].label)) for key, points in groups.items()}
        found = {key: points for key, points in found.items() if len({number for number, _ in points}) > 1}
        others = styles()
        lines = [Draws(names[key], found[key], next(others)) for key in sorted(found)]
        return cls(comparison, lines) if lines else None
