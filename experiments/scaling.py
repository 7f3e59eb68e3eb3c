"""How a training step's time, memory and operations grow with the vocabulary: the CSV of a benchmark, read and fitted.

``python -m experiments.benchmark study=vocabulary`` measures it. Imports no torch.
"""

import csv
import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments.statistics import Power

FITTED_FROM = 10_000
"""Words from which on powers are fitted, where there are three sizes: below, a step's fixed costs bend the line."""

SLICE = ("tokens", "hidden", "precision", "device", "threads", "optim")


@dataclasses.dataclass(frozen=True)
class Point:
    """One layer at one size of vocabulary.

    Attributes:
        vocab: V.
        seconds: median time of the loss and all gradients of a step.
        flops: counted operations of the same; None where they cannot be counted.
        memory: bytes of parameters and gradients and of what a step takes beyond them; None where not measured.
        over_full: the time over full softmax's, median of the ratios within a round; None where that was not raced.
    """

    vocab: int
    seconds: float
    flops: float | None
    memory: float | None
    over_full: float | None


@dataclasses.dataclass(frozen=True)
class Growth:
    """One layer over sizes of vocabulary, ascending.

    Attributes:
        contestant: as the benchmark calls it, ``sampled_softmax(samples=1024)``.
        points: what was measured.
    """

    contestant: str
    points: tuple[Point, ...]

    @property
    def name(self) -> str:
        """The layer's configuration."""
        return self.contestant.partition("(")[0]

    @property
    def options(self) -> dict[str, str]:
        """The options that are not the configuration's own."""
        return dict(re.findall(r"(\w+)=(\[[^\]]*\]|[^,)]+)", self.contestant.partition("(")[2]))

    @property
    def label(self) -> str:
        """Its name for people, as that of a run's layer."""
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return self.name.replace("_", " ").capitalize() + (f" ({options})" if options else "")

    def power(self, measure: str) -> Power | None:
        """Return the power of V that ``seconds``, ``flops`` or ``memory`` follows."""
        points = [point for point in self.points if getattr(point, measure)]
        large = [point for point in points if point.vocab >= FITTED_FROM]
        chosen = large if len(large) >= 3 else points
        return Power.fitted([point.vocab for point in chosen], [getattr(point, measure) for point in chosen])


@dataclasses.dataclass(frozen=True)
class Scaling:
    """The layers of a benchmark at several sizes of vocabulary, all else equal.

    Attributes:
        source: the file, for people.
        tokens: N, of a step.
        hidden: D.
        conditions: precision, device, threads, optimiser, clock, rounds, and what is known of the machine.
        growths: a layer each.
    """

    source: str
    tokens: int
    hidden: int
    conditions: dict[str, str]
    growths: list[Growth]

    @property
    def vocabs(self) -> list[int]:
        """The sizes."""
        return sorted({point.vocab for growth in self.growths for point in growth.points})

    @classmethod
    def read(cls, path: Path) -> "Scaling | None":
        """Return the slice of a benchmark's CSV with the most points, its one size or many; None without any.

        Raises:
            ValueError: the file is no benchmark's.
        """
        try:
            lines = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
            if any(None in line or None in line.values() for line in lines):
                raise ValueError("a line is cut off")
            slices: dict[tuple[str, ...], dict[str, list[Point]]] = {}
            for line in lines:
                if line["kind"] == "layer" and line["status"] == "timed" and line["train_seconds"]:
                    points = slices.setdefault(tuple(line[key] for key in SLICE), {})
                    points.setdefault(line["contestant"], []).append(_point(line))
            if not slices:
                return None
            key = max(slices, key=lambda key: (len({p.vocab for own in slices[key].values() for p in own}), key))
            found = dict(zip(SLICE, key, strict=True))
            tokens, hidden = int(found.pop("tokens")), int(found.pop("hidden"))
            found["clock"] = next(line["clock"] for line in lines if line["clock"])
            here = [line for line in lines if tuple(line[name] for name in SLICE) == key]
            if rounds := sorted({int(line["train_rounds"]) for line in here if line.get("train_rounds")}):
                found["rounds"] = " to ".join(map(str, sorted({rounds[0], rounds[-1]})))
            growths = [
                Growth(name, tuple(sorted(points, key=lambda point: point.vocab)))
                for name, points in sorted(slices[key].items())
            ]
        except (OSError, KeyError, TypeError, ValueError, StopIteration, csv.Error) as error:
            raise ValueError(f"damaged: no table of a benchmark ({' '.join(str(error).split())})") from error
        return cls("/".join(path.resolve().parts[-2:]), tokens, hidden, found | _machine(path.parent), growths)

    @classmethod
    def read_all(cls, paths: Iterable[Path]) -> tuple["Scaling | None", list[tuple[str, str]]]:
        """Return the benchmark with the most sizes of vocabulary, and ``(file, reason)`` of what cannot be read."""
        found, left_out = [], []
        for path in sorted(set(map(Path, paths))):
            try:
                found.append(cls.read(path))
            except ValueError as error:
                left_out.append(("/".join(path.resolve().parts[-2:]), str(error)))
        several = [one for one in found if one and len(one.vocabs) > 1]
        return max(several, key=lambda one: (len(one.vocabs), len(one.growths)), default=None), left_out

    def table(self) -> str:
        """Return the points as CSV."""
        lines = ["layer,tokens,hidden,vocab,seconds,flops,memory_bytes"]
        lines += [
            ",".join([f'"{growth.contestant}"', *(str(value) if value is not None else "" for value in
                      (self.tokens, self.hidden, point.vocab, point.seconds, point.flops, point.memory))])
            for growth in self.growths for point in growth.points
        ]  # fmt: skip
        return "\n".join(lines) + "\n"


def holds_step_times(path: Path) -> bool:
    """Return whether a benchmark's CSV is of step times, which :class:`Scaling` reads, and not of promises kept."""
    with path.open(encoding="utf-8") as file:
        return "train_seconds" in file.readline().strip().split(",")


def _point(line: dict[str, str]) -> Point:
    def number(name: str, kind: Callable[[str], Any] = float) -> Any:
        return kind(line[name]) if line.get(name) else None

    parts = [number(name) for name in ("parameters", "gradient_bytes", "extra_bytes")]
    size = 2 if line["precision"] == "bf16_parameters" else 4
    memory = None if None in parts else size * parts[0] + parts[1] + parts[2]
    seconds = float(line["train_seconds"])
    if not seconds > 0:
        raise ValueError(f"train_seconds is {seconds}")
    return Point(int(line["vocab"]), seconds, number("flops"), memory, number("train_over_full_softmax"))


def _machine(folder: Path) -> dict[str, str]:
    """Return what stands beside a benchmark's table about where it ran."""
    try:
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        known = {"processor": environment.get("processor"), "revision": str(environment.get("revision") or "")[:10]}
        known["PyTorch"] = environment.get("versions", {}).get("torch")
    except (OSError, ValueError, AttributeError):
        return {}
    return {key: str(value) for key, value in known.items() if value}
