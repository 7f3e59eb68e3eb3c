"""Promises of speed: a figure promised beside the figure measured, line by line.

What is promised stands in ``promises.py``; this is how a promise is measured and judged. Lines that need the same
entrants are measured together, in one race.
"""

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from experiments import wording
from experiments.bench.cell import Cell, Unavailable, problem
from experiments.bench.contestants import Contestant
from experiments.bench.laws import reported
from experiments.bench.race import Memory, Runner, Times, clock_of, memory, race
from experiments.bench.records import REFERENCE, Record, markdown


@dataclasses.dataclass(frozen=True)
class Entrant:
    """A contestant in one mode in one cell; ``measured``: whether its memory is wanted, too."""

    contestant: Contestant
    cell: Cell
    mode: str = "train"
    measured: bool = False


@dataclasses.dataclass(frozen=True)
class Measured:
    """What came out of a race, by the entrants' keys.

    Attributes:
        times: of those that ran.
        memories: of those that were measured.
        missing: why the others did not.
    """

    times: Mapping[str, Times]
    memories: Mapping[str, Memory]
    missing: Mapping[str, Unavailable]

    def over(self, one: str, other: str) -> float:
        """Return how many times as long the one takes as the other.

        Raises:
            Unavailable: one of them was not timed.
        """
        return self._of(self.times, one).over(self._of(self.times, other))

    def time(self, key: str) -> Times:
        """Return the times of an entrant.

        Raises:
            Unavailable: it was not timed.
        """
        return self._of(self.times, key)

    def memory(self, key: str) -> Memory:
        """Return the memory of an entrant.

        Raises:
            Unavailable: it was not measured.
        """
        return self._of(self.memories, key)

    def _of(self, found: Mapping[str, Any], key: str) -> Any:
        if key in found:
            return found[key]
        raise self.missing.get(key, Unavailable("was not measured"))


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number to be measured: how it is made, of which entrants, and its unit as written after it."""

    of: Callable[[Measured], float]
    needs: tuple[str, ...]
    unit: str = "×"


def ratio(one: str, other: str) -> Figure:
    """How many times as long the one takes as the other."""
    return Figure(lambda found: found.over(one, other), (one, other))


def percentage(one: str, other: str) -> Figure:
    """The same in per cent."""
    return Figure(lambda found: 100 * found.over(one, other), (one, other), " %")


def ratio_or_less(one: str, least: str, other: str) -> Figure:
    """How many times as long the one takes as the other; where the one does not fit, what it takes at least."""
    return Figure(lambda found: found.over(one if one in found.times else least, other), (one, least, other))


def beyond_gradients(key: str) -> Figure:
    """Memory beyond parameters, inputs and gradients; buffers that are kept count."""
    return Figure(lambda found: _beyond_gradients(found, key) / 2**20, (key,), " MiB")


def beyond_state(key: str) -> Figure:
    """Memory of a step beyond parameters and the optimiser's state."""
    return Figure(lambda found: found.memory(key).peak / 2**20, (key,), " MiB")


def worst_ratio(pairs: Sequence[tuple[str, str]]) -> Figure:
    """The least over pairs of how many times as long the one takes as the other."""
    return Figure(lambda found: min(found.over(*pair) for pair in pairs), tuple(key for pair in pairs for key in pair))


def worst_memory(pairs: Sequence[tuple[str, str]]) -> Figure:
    """The most over pairs of how many times the other's memory beyond gradients the one takes."""
    return Figure(
        lambda found: max(_beyond_gradients(found, a) / max(1, _beyond_gradients(found, b)) for a, b in pairs),
        tuple(key for pair in pairs for key in pair),
    )


def exponent(by_size: Mapping[int, str]) -> Figure:
    """The power of the size that the time grows with: the slope of a line fitted to the logarithms."""

    def slope(found: Measured) -> float:
        points = [(math.log(size), math.log(found.time(key).median)) for size, key in by_size.items()]
        centre_x, centre_y = (math.fsum(column) / len(points) for column in zip(*points, strict=True))
        spread = sum((x - centre_x) ** 2 for x, _ in points)
        return sum((x - centre_x) * (y - centre_y) for x, y in points) / spread

    return Figure(slope, tuple(by_size.values()), "")


def _beyond_gradients(found: Measured, key: str) -> int:
    memory = found.memory(key)
    return max(0, memory.peak - memory.gradients) + memory.kept


@dataclasses.dataclass(frozen=True)
class Line:
    """One promise.

    Attributes:
        name: a number for what it is about, and a letter.
        text: what the figure is of.
        figure: what is measured.
        at_most: the bound, where the figure is to be below it.
        at_least: the bound, where it is to be above.
        stretch: reported, not required.
        hurdle: why it cannot be measured here; empty if it can.
    """

    name: str
    text: str
    figure: Figure
    at_most: float | None = None
    at_least: float | None = None
    stretch: bool = False
    hurdle: str = ""

    @property
    def promise(self) -> str:
        """The bound in words."""
        bound, side = (self.at_least, "at least") if self.at_most is None else (self.at_most, "at most")
        return f"{side} {bound:,g}{self.figure.unit}"

    def judged(self, found: Measured) -> "Result":
        """Take the figure and compare."""
        if self.hurdle:
            return Result(self, None, "unmeasured", self.hurdle)
        try:
            value = self.figure.of(found)
        except Unavailable as reason:
            return Result(self, None, "not there" if "not there" in str(reason) else "unmeasured", str(reason))
        reached = value >= self.at_least if self.at_most is None else value <= self.at_most
        return Result(self, value, "pass" if reached else "short of it" if self.stretch else "miss")


@dataclasses.dataclass(frozen=True)
class Race:
    """Lines that are measured together, and who races for them; the title says at what sizes."""

    title: str
    entrants: Mapping[str, Entrant]
    lines: Sequence[Line]


@dataclasses.dataclass(frozen=True)
class Result:
    """A line and what became of it.

    ``status`` is ``pass``, ``miss`` (``short of it`` where the line is a stretch), ``not there`` where what it is about
    does not exist yet, or ``unmeasured``.
    """

    line: Line
    value: float | None
    status: str
    reason: str = ""

    def cells(self) -> list[str]:
        """Return a line of a table."""
        measured = self.reason if self.value is None else f"{wording.figures(self.value)}{self.line.figure.unit}"
        stretch = " (stretch)" if self.line.stretch else ""
        return [self.line.name, self.line.text + stretch, self.line.promise, measured, self.status]


def chosen(races: Iterable[Race], names: Iterable[Any]) -> list[Race]:
    """Return the races with those of their lines whose names begin with one of the given; ``*`` is all of them.

    Raises:
        ValueError: there are none.
    """
    races = list(races)
    there = sorted(line.name for race in races for line in race.lines)
    kept = set()
    for name in map(str, names):
        matches = [each for each in there if name == "*" or each.startswith(name)]
        if not matches:
            raise ValueError(f"study.lines={name}: no such line here; choose from {', '.join(there)}")
        kept.update(matches)
    fewer = [dataclasses.replace(race, lines=[x for x in race.lines if x.name in kept]) for race in races]
    return [race for race in fewer if race.lines]


def measured(
    one: Race,
    *,
    rounds: int,
    seconds: float,
    advance: Callable[[float, str], None] = lambda share, text: None,
) -> tuple[list[Result], list[Record]]:
    """Run a race and return its results, and what they rest on.

    Args:
        one: the race; only those run whom its lines need.
        rounds: how many.
        seconds: after which no further round starts.
        advance: called with the share that has been done since the last call, and with what is done next.
    """
    keys = dict.fromkeys(key for line in one.lines if not line.hurdle for key in line.figure.needs)
    entrants = {key: one.entrants[key] for key in keys}
    memories: dict[str, Memory] = {}
    missing: dict[str, Unavailable] = {}
    runners: dict[str, Runner] = {}
    for key, entrant in entrants.items():
        advance(0.3 / len(entrants), f"{entrant.contestant.label}: laws, memory")
        torch.set_num_threads(entrant.cell.threads)
        try:
            entrant.contestant.check(entrant.cell)
            if entrant.measured or entrant.contestant.label == REFERENCE:  # which may not fit
                memories[key] = memory(entrant.contestant, entrant.cell, [entrant.mode])[entrant.mode]
        except Unavailable as reason:
            missing[key] = reason
    for key, entrant in entrants.items():
        if key in missing:
            continue
        advance(0.2 / len(entrants), f"{entrant.contestant.label}: building")
        try:
            with reported():
                runners[key] = Runner(entrant.contestant.build(entrant.cell), entrant.mode, entrant.cell)
        except Unavailable as reason:
            missing[key] = reason
    turn = 0.5 / max(1, len(runners) * (rounds + 1))
    times = race(runners, rounds=rounds, budget=seconds, advance=lambda: advance(turn, f"racing at {one.title}"))
    problem.cache_clear()
    records = [
        Record(
            entrant.cell,
            entrant.contestant.label,
            entrant.contestant.kind,
            str(missing.get(key, "")),
            times={entrant.mode: times[key]} if key in times else {},
            memory={entrant.mode: memories[key]} if key in memories else {},
            clock=clock_of(entrant.cell)[0],
        )
        for key, entrant in entrants.items()
    ]
    found = Measured(times, memories, missing)
    titled = [dataclasses.replace(line, text=f"{line.text}, {one.title}") for line in one.lines]
    return [line.judged(found) for line in titled], records


def table(results: Iterable[Result]) -> str:
    """Return the lines as a table in Markdown, in order."""
    lines = [result.cells() for result in sorted(results, key=lambda result: result.line.name)]
    return markdown([["", "", "promised", "measured", ""], *lines], left=(0, 1, 4))


def to_csv(results: Iterable[Result]) -> str:
    """Return a line for each promise, in order."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["line", "text", "at_most", "at_least", "unit", "measured", "status", "reason"])
    for result in sorted(results, key=lambda result: result.line.name):
        line = result.line
        writer.writerow([line.name, line.text, line.at_most, line.at_least, line.figure.unit.strip(), result.value,
                         result.status, result.reason])  # fmt: skip
    return stream.getvalue()
