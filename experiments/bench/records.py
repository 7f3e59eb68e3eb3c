"""What comes out of a benchmark, a line for each contestant and cell: as CSV, and as a table."""

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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


class Unfinished:
    """The cells of a grid that was cut short, each in a file of its own, to go on from.

    Args:
        folder: of the files.
        key: what the measurements depend on; files of another key are passed over.
    """

    def __init__(self, folder: Path, key: object) -> None:
        self.folder = folder
        self.key = json.dumps(key, sort_keys=True)

    def load(self, cell: Cell) -> list[Record]:
        """Return the records of a cell; none if it was not reached."""
        try:
            content = json.loads(self._file(cell).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
        return [_restored(each) for each in content["records"]] if content["key"] == self.key else []

    def save(self, cell: Cell, records: Sequence[Record]) -> None:
        """Keep the records of a cell, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / "part"
        content = {"key": self.key, "records": [dataclasses.asdict(record) for record in records]}
        part.write_text(json.dumps(content), encoding="utf-8")
        part.replace(self._file(cell))

    def forget(self, cells: Iterable[Cell]) -> None:
        """Forget the cells of a grid that is finished."""
        for cell in cells:
            self._file(cell).unlink(missing_ok=True)
        if self.folder.exists() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _file(self, cell: Cell) -> Path:
        name = json.dumps(dataclasses.asdict(cell), sort_keys=True)
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"


def _restored(fields: dict[str, Any]) -> Record:
    return Record(**fields | {
        "cell": Cell(**fields["cell"]),
        "work": fields["work"] and Work(*fields["work"]),
        "times": {mode: Times(tuple(rounds)) for mode, (rounds,) in fields["times"].items()},
        "memory": {mode: Memory(*memory) for mode, memory in fields["memory"].items()},
    })  # fmt: skip


NAMES = {"forward": "Forward", "train": "Loss and gradients", "per_token": "Gradients per token", "step": "Whole step"}
"""Of the modes."""


@dataclasses.dataclass(frozen=True)
class Column:
    """A number of a record: its heading, what it is, its value, and the value for people."""

    heading: str
    explanation: str
    value: Callable[[Record], float | None]
    show: Callable[[Record], str]


@dataclasses.dataclass(frozen=True)
class Table:
    """What is told about a cell.

    Attributes:
        cell: where.
        rows: who was timed, the fastest first.
        columns: what is known of any of them.
        remarks: about the machine's limits and the clock.
        missing: who was not timed.
    """

    cell: Cell
    rows: list[Record]
    columns: list[Column]
    remarks: str
    missing: list[Record]

    @classmethod
    def of(cls, records: Sequence[Record]) -> "Table":
        """Tell about the records of one cell."""
        cell = records[0].cell
        timed = [record for record in records if record.times and record.kind != "limit"]
        modes = [mode for mode in MODES if any(mode in record.times for record in timed)]
        pace = {record.label: record.times["train"].median for record in records if record.kind == "limit"
                and record.times}  # fmt: skip
        main = "train" if "train" in modes else next(iter(modes), "")
        rows = sorted(timed, key=lambda record: min(record.times[mode].median for mode in record.times
                                                    if mode == main or main not in record.times))  # fmt: skip
        columns = [column for column in _columns(modes, main, pace) if any(column.show(row) for row in rows)]
        return cls(cell, rows, columns, _remarks(cell, timed, pace), [record for record in records if record.reason])

    def __str__(self) -> str:
        lines = [["", *(column.heading for column in self.columns)]]
        lines += [[row.label, *(column.show(row) for column in self.columns)] for row in self.rows]
        parts = [f"### {self.cell}\n", markdown(lines) if self.rows else "", f"{self.remarks}\n"]
        parts += [f"- not timed: {record.label}: {record.reason}" for record in self.missing]
        return "\n".join(filter(None, parts)) + "\n"


def tables(records: Sequence[Record]) -> list[Table]:
    """Return a table for each cell, in order."""
    return [Table.of([record for record in records if record.cell == cell])
            for cell in dict.fromkeys(record.cell for record in records)]  # fmt: skip


def _columns(modes: Sequence[str], main: str, pace: Mapping[str, float]) -> Iterator[Column]:
    for mode in modes:
        yield Column(
            f"{NAMES[mode]}, ms", "median, and quartiles in brackets", lambda r, mode=mode: _median(r, mode),
            lambda r, mode=mode: _spread(r.times.get(mode)),
        )  # fmt: skip
    for heading, label in (("× eager", REFERENCE), ("× full_softmax", OURS), ("× products", Products.label)):
        yield _column(heading, f"{NAMES.get(main, '').lower()}, over the time of {label}: median of the rounds' ratios",
                      lambda r, label=label: r.ratio(main, label))  # fmt: skip
    yield _column("GFLOP", "operations of products and weighted sums of rows, counted",
                  lambda r: r.work and r.work.flops / 1e9)  # fmt: skip
    yield _column("GB moved", "read and written by each operation on its own, counted",
                  lambda r: r.work and r.work.bytes / 1e9)  # fmt: skip
    yield _column("× its cost", "over its operations at the products' pace or its bytes at a copy's, the longer",
                  lambda r: _over(_median(r, "train"), cost_seconds(r, pace)))  # fmt: skip
    yield _column("MiB beyond gradients", "memory at the highest point beyond parameters, inputs and gradients",
                  lambda r: _over(r.extra_bytes, 2**20))  # fmt: skip
    yield _column("MiB of gradients", "that a step leaves for the optimiser",
                  lambda r: r.memory["train"].gradients / 2**20 if "train" in r.memory else None)  # fmt: skip


def _column(heading: str, explanation: str, value: Callable[[Record], float | None]) -> Column:
    return Column(heading, explanation, value, lambda record: _figures(value(record)))


def _remarks(cell: Cell, timed: Sequence[Record], pace: Mapping[str, float]) -> str:
    said = []
    if Products.label in pace:
        spent = pace[Products.label]
        rate = 6 * cell.tokens * cell.hidden * cell.vocab / spent / 1e9
        said.append(f"The three products of the dense step alone: {_figures(1000 * spent)} ms, {rate:,.0f} GFLOP/s.")
    if Copy.label in pace:
        said.append(f"A copy moves {Copy.bytes / pace[Copy.label] / 1e9:,.1f} GB/s.")
    said.append(f"Medians of {timed[0].clock}, quartiles in brackets." if timed else "Nothing was timed.")
    return " ".join(said)


def cost_seconds(record: Record, pace: Mapping[str, float]) -> float | None:
    """Return how long a record's work would take: its operations at the products' pace, or its bytes at a copy's.

    The longer of the two, for everything that ``train`` does; None where it is not known.
    """
    if record.work is None or not {Products.label, Copy.label} <= pace.keys():
        return None
    cell = record.cell
    flops = 6 * cell.tokens * cell.hidden * cell.vocab / pace[Products.label]
    return max(record.work.flops / flops, record.work.bytes / (Copy.bytes / pace[Copy.label]))


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


def _median(record: Record, mode: str) -> float | None:
    return record.times[mode].median if mode in record.times else None


def _spread(times: Times | None) -> str:
    if times is None:
        return ""
    low, high = (_figures(1000 * each) for each in times.quartiles)
    return f"{_figures(1000 * times.median)} ({low}–{high})"


def _over(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def _figures(value: float | None) -> str:
    return "" if value is None else wording.figures(value)
