"""The page about a benchmark: one file that works offline, with figures against the size of the vocabulary."""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import plotly.offline
from markupsafe import Markup

from experiments import wording
from experiments.bench.cell import Cell
from experiments.bench.goals import Result
from experiments.bench.records import NAMES, REFERENCE, Record, Table, tables
from experiments.drawing import AXIS, LAYOUT, log_ticks
from experiments.reading import flat
from experiments.report import TEMPLATES
from experiments.style import Style, styles

METHOD = """Everybody runs in turn, round by round in turning order and in one process; a time is the median of the
rounds, a ratio the median of the rounds' ratios. Words are drawn from Zipf's law. Memory is the highest resident set
(on CUDA what the allocator gave out) of a process of its own, after a first step. Operations and bytes are counted."""


@dataclasses.dataclass(frozen=True)
class Contestant:
    """How one is drawn."""

    label: str
    style: Style


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure as JSON, with its caption."""

    name: str
    caption: str
    script: Markup


@dataclasses.dataclass(frozen=True)
class Slice:
    """The cells that differ in V only."""

    name: str
    title: str
    contestants: list[Contestant]
    figures: list[Figure]
    tables: list[Table]

    @property
    def look(self) -> dict[str, Contestant]:
        """The contestants by label."""
        return {contestant.label: contestant for contestant in self.contestants}


def html(title: str, environment: Mapping[str, Any], records: Sequence[Record], results: Sequence[Result] = ()) -> str:
    """Return the page about records of a grid, or about promises."""
    slices = [] if results else _slices(records)
    jinja = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    machine = [environment["processor"] if environment["device"] == "cpu" else environment["device"]]
    machine += [f"PyTorch {environment['versions']['torch']}"]
    return jinja.get_template("benchmark.html.j2").render(
        title=title,
        machine="; ".join(machine),
        answer=answer_to_promises(results) if results else answer(records),
        results=sorted(results, key=lambda result: result.line.name),
        slices=slices,
        missing=not_timed(records),
        method=" ".join(METHOD.split()),
        environment=dict(sorted(flat(environment).items())),
        plotly=Markup(plotly.offline.get_plotlyjs()) if any(part.figures for part in slices) else "",
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
    )


def answer(records: Sequence[Record]) -> str:
    """Say in a sentence which layer's training step is the fastest at the largest vocabulary."""
    timed = [record for record in records if record.kind == "layer" and "train" in record.times]
    if not timed:
        return "No layer was timed."
    largest = max(record.cell.vocab for record in timed)
    fastest = min((record for record in timed if record.cell.vocab == largest), key=lambda r: r.times["train"].median)
    over = fastest.ratio("train", REFERENCE)
    compared = f", {1 / over:,.1f} times as fast as the eager softmax" if over else ""
    return (
        f"At V {largest:,} the fastest loss and gradients are those of {fastest.label}: "
        f"{1000 * fastest.times['train'].median:,.2f} ms for {fastest.cell.tokens:,} tokens{compared}."
    )


def answer_to_promises(results: Sequence[Result]) -> str:
    """Say in a sentence how many promises are kept."""
    required = [result for result in results if not result.line.stretch]
    count = {status: sum(result.status == status for result in required) for status in ("pass", "miss")}
    rest = len(required) - sum(count.values())
    return f"{count['pass']} of {len(required)} promises are kept, {count['miss']} are missed" + (
        f", {rest} could not be measured." if rest else "."
    )


def not_timed(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Return who was not timed and why; where that is not so in every cell, with the sizes of vocabulary."""
    refused: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.reason:
            refused.setdefault((record.label, record.reason), []).append(record)
    cells = Counter(record.label for record in records)
    found = []
    for (label, reason), own in refused.items():
        vocabs = wording.listing([f"{vocab:,}" for vocab in sorted({record.cell.vocab for record in own})])
        found.append((label, reason if len(own) == cells[label] else f"at V {vocabs}: {reason}"))
    return found


def _slices(records: Sequence[Record]) -> list[Slice]:
    def but_vocab(record: Record) -> Cell:
        return dataclasses.replace(record.cell, vocab=2)

    found = []
    for number, cell in enumerate(dict.fromkeys(map(but_vocab, records))):
        here = [record for record in records if but_vocab(record) == cell]
        others = styles()
        contestants = [
            Contestant(label, Style("ink", "#1a1a1a", "circle", "solid") if label == REFERENCE else next(others))
            for label in dict.fromkeys(record.label for record in here if record.times and record.kind != "limit")
        ]
        title = str(cell).replace(f", V {cell.vocab}", "")
        found.append(Slice(f"slice-{number}", title, contestants, _figures(number, here, contestants), tables(here)))
    return found


def _figures(number: int, records: Sequence[Record], contestants: Sequence[Contestant]) -> list[Figure]:
    """Draw time and memory against V, where there are several."""
    if len({record.cell.vocab for record in records if record.times}) < 2:
        return []
    measures: list[tuple[str, str, Callable[[Record], float | None]]] = [
        (f"{NAMES[mode]}, milliseconds", mode, lambda r, mode=mode: _milliseconds(r, mode))
        for mode in ("train", "step", "forward", "per_token")
    ]
    measures.append(("Memory beyond parameters, inputs and gradients, MiB", "memory", _mebibytes))
    found = []
    for caption, name, value in measures:
        points = {
            contestant: [(r.cell.vocab, value(r)) for r in records if r.label == contestant.label and value(r)]
            for contestant in contestants
        }
        if any(points.values()):
            script = json.dumps(_log_log(points, caption), allow_nan=False).replace("</", "<\\/")
            found.append(Figure(f"slice-{number}-{name}", caption, Markup(script)))
    return found


def _milliseconds(record: Record, mode: str) -> float | None:
    return 1000 * record.times[mode].median if mode in record.times else None


def _mebibytes(record: Record) -> float | None:
    return None if record.extra_bytes is None else max(record.extra_bytes, 2**12) / 2**20  # a page: 0 has no logarithm


def _log_log(points: Mapping[Contestant, Sequence[tuple[int, float]]], caption: str) -> dict[str, Any]:
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "meta": contestant.label,
            "x": [vocab for vocab, _ in line],
            "y": [value for _, value in line],
            "hovertemplate": "<b>%{meta}</b><br>V %{x:,}<br>%{y:,.3~r}<extra></extra>",
            "line": {"color": f"@{contestant.style.key}", "width": 2, "dash": contestant.style.dash},
            "marker": {"symbol": contestant.style.marker, "size": 7, "color": f"@{contestant.style.key}"},
        }
        for contestant, line in points.items()
        if line
    ]
    vocabs, values = (sorted(set(axis)) for axis in zip(*itertools.chain(*points.values()), strict=True))
    ticks = log_ticks(values[0] / 1.2, values[-1] * 1.2)
    x_axis = {"title": {"text": "V"}, "tickvals": vocabs, "ticktext": [f"{vocab:,}" for vocab in vocabs]}
    y_axis = {
        "title": {"text": caption.split(", ")[-1]},
        "tickvals": ticks,
        "ticktext": [f"{tick:,.6g}" for tick in ticks],
    }
    return {"data": traces, "layout": LAYOUT | {"xaxis": AXIS | {"type": "log"} | x_axis,
                                                "yaxis": AXIS | {"type": "log"} | y_axis}}  # fmt: skip
