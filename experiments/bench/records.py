"""What comes out of a benchmark, a line for each contestant and cell: as CSV, and as a table."""

import csv
import dataclasses
import io
from collections.abc import Collection, Iterable, Iterator, Sequence

from experiments import wording
from experiments.bench.cell import MODES, Cell
from experiments.bench.contestants import Contestant
from experiments.bench.limits import Copy, Products
from experiments.bench.race import Memory, Times
from lvsoftmax.cost import Work

REFERENCE = "PyTorch, eager"
"""What ratios are taken to, beside the products."""
OURS = "full_softmax"


@dataclasses.dataclass(frozen=True)
class Record:
    """One contestant in one cell.

    Attributes:
        cell: where.
        label: who.
        kind: ``layer``, ``peer`` or ``limit``.
        reason: why it was not timed; empty if it was.
        parameters: trainable numbers.
        work: of one run of ``train``; None where it cannot be counted.
        times: of each mode timed.
        memory: of each mode measured.
        ratios: for each mode, the ratios to the times of others, by their label.
        clock: what the times are of.
    """

    cell: Cell
    label: str
    kind: str
    reason: str = ""
    parameters: int | None = None
    work: Work | None = None
    times: dict[str, Times] = dataclasses.field(default_factory=dict)
    memory: dict[str, Memory] = dataclasses.field(default_factory=dict)
    ratios: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    clock: str = ""

    @classmethod
    def refused(cls, contestant: Contestant, cell: Cell, reason: object) -> "Record":
        """Return the record of a contestant that was not timed."""
        return cls(cell, contestant.label, contestant.kind, str(reason))

    def ratio(self, mode: str, label: str) -> float | None:
        """Return how many times another's time this one took; None if either was not timed."""
        return self.ratios.get(mode, {}).get(label)

    @property
    def extra_bytes(self) -> int | None:
        """Memory of ``train`` at its highest point beyond parameters, inputs and gradients; buffers kept count."""
        memory = self.memory.get("train")
        return memory and max(0, memory.peak - memory.gradients) + memory.kept

    def line(self) -> dict[str, object]:
        """Return the record as an unrounded line of a table; None for what is not known."""
        line: dict[str, object] = {
            "contestant": self.label,
            "kind": self.kind,
            "tokens": self.cell.tokens,
            "hidden": self.cell.hidden,
            "vocab": self.cell.vocab,
            "precision": self.cell.precision,
            "device": self.cell.device,
            "threads": self.cell.threads,
            "optim": self.cell.optim,
            "status": "not timed" if self.reason else "timed",
            "reason": self.reason,
            "parameters": self.parameters,
            "flops": self.work and self.work.flops,
            "bytes": self.work and self.work.bytes,
            "clock": self.clock,
        }
        for mode in MODES:
            times = self.times.get(mode)
            line[f"{mode}_seconds"] = times and times.median
            line[f"{mode}_fastest"] = times and min(times.rounds)
            line[f"{mode}_first_quartile"] = times and times.quartiles[0]
            line[f"{mode}_third_quartile"] = times and times.quartiles[1]
            line[f"{mode}_rounds"] = times and len(times.rounds)
            line[f"{mode}_over_eager"] = self.ratio(mode, REFERENCE)
            line[f"{mode}_over_full_softmax"] = self.ratio(mode, OURS)
        line["train_over_products"] = self.ratio("train", Products.label)
        for mode in ("train", "step"):
            memory = self.memory.get(mode)
            line[f"{mode}_peak_bytes"] = memory and memory.peak
            line[f"{mode}_kept_bytes"] = memory and memory.kept
        line["gradient_bytes"] = self.memory["train"].gradients if "train" in self.memory else None
        line["extra_bytes"] = self.extra_bytes
        return line


def to_csv(records: Iterable[Record]) -> str:
    """Return a line for each record."""
    stream = io.StringIO()
    header = list(Record(Cell(1, 1, 2), "", "").line())
    writer = csv.DictWriter(stream, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(record.line() for record in records)
    return stream.getvalue()


def cells(records: Iterable[Record]) -> list[Cell]:
    """Return the cells, in order."""
    return list(dict.fromkeys(record.cell for record in records))


def tables(records: Sequence[Record]) -> Iterator[str]:
    """Yield a heading, a table and what is missing from it, for each cell, as Markdown."""
    for cell in cells(records):
        here = [record for record in records if record.cell == cell]
        timed = [record for record in here if record.times and record.kind != "limit"]
        modes = [mode for mode in MODES if any(mode in record.times for record in timed)]
        products, copy = (
            next((r.times["train"].median for r in here if r.label == label and r.times), None)
            for label in (Products.label, Copy.label)
        )
        yield f"### {cell}\n"
        if timed:
            yield _table(timed, modes, cell, products, copy)
        notes = []
        if products:
            notes.append(
                f"The three products alone: {_milliseconds(products)} ms, "
                f"{6 * cell.tokens * cell.hidden * cell.vocab / products / 1e9:,.0f} GFLOP/s."
            )
        if copy:
            notes.append(f"A copy moves {Copy.bytes / copy / 1e9:,.1f} GB/s.")
        clock = next((record.clock for record in timed), "")
        notes.append(f"Medians of {clock}, quartiles in brackets." if clock else "Nothing was timed.")
        yield " ".join(notes) + "\n"
        missing = [record for record in here if record.reason]
        if missing:
            yield "\n".join(f"- not timed: {record.label}: {record.reason}" for record in missing) + "\n"


NAMES = {"forward": "forward", "train": "loss and gradients", "per_token": "gradients per token", "step": "whole step"}
"""Of the modes."""


def _table(
    records: Sequence[Record], modes: Sequence[str], cell: Cell, products: float | None, copy: float | None
) -> str:
    records = sorted(records, key=lambda record: record.times[modes[-1]].median if modes[-1] in record.times else 1e9)
    main = "train" if "train" in modes else modes[0]
    head = ["", *(f"{NAMES[mode]}, ms" for mode in modes), "× eager", "× full_softmax", "× products"]
    head += ["GFLOP", "GB moved", "× its cost", "MiB beyond gradients", "MiB of gradients"]
    rows = []
    for record in records:
        row = [record.label]
        for mode in modes:
            times = record.times.get(mode)
            low, high = map(_milliseconds, times.quartiles) if times else ("", "")
            row.append(f"{_milliseconds(times.median)} ({low}–{high})" if times else "")
        row += [_ratio(record.ratio(main, label)) for label in (REFERENCE, OURS, Products.label)]
        work = record.work
        row += [f"{work.flops / 1e9:,.3g}", f"{work.bytes / 1e9:,.3g}"] if work else ["", ""]
        cost = cost_seconds(record, products, copy)
        row.append(_ratio(record.times[main].median / cost) if cost and main in record.times else "")
        memory = record.memory.get("train")
        row += [_mebibytes(record.extra_bytes), _mebibytes(memory.gradients)] if memory else ["", ""]
        rows.append(row)
    kept = [place for place in range(len(head)) if any(row[place] for row in rows)]
    return markdown([[line[place] for place in kept] for line in [head, *rows]])


def cost_seconds(record: Record, products: float | None, copy: float | None) -> float | None:
    """Return what a record's work would take: its operations at the products' pace or its bytes at a copy's.

    The longer of the two, for everything that ``train`` does; None where it was not counted.
    """
    if record.work is None or products is None or copy is None:
        return None
    cell = record.cell
    pace = 6 * cell.tokens * cell.hidden * cell.vocab / products
    return max(record.work.flops / pace, record.work.bytes / (Copy.bytes / copy))


def markdown(lines: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Return a table with the first line as its head; what stands in the columns ``left`` begins on the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width if place in left else "-" * (width - 1) + ":" for place, width in enumerate(widths)]

    def aligned(line: Sequence[str]) -> list[str]:
        return [
            text.ljust(width) if place in left else text.rjust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        ]

    return "".join(f"| {' | '.join(line)} |\n" for line in [aligned(lines[0]), rule, *map(aligned, lines[1:])])


def _milliseconds(seconds: float) -> str:
    return wording.figures(1000 * seconds)


def _mebibytes(size: int | None) -> str:
    return "" if size is None else wording.figures(size / 2**20)


def _ratio(value: float | None) -> str:
    return "" if value is None else wording.figures(value)
