"""Every contestant in every cell of a grid."""

import dataclasses
import functools
import gc
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from experiments.bench.cell import MODES, Cell, Instance, Unavailable, problem
from experiments.bench.contestants import Contestant, Layer, layers, peers
from experiments.bench.laws import reported
from experiments.bench.limits import Copy, Products
from experiments.bench.race import Memory, Runner, Times, allowance, clock_of, memory, race
from experiments.bench.records import OURS, REFERENCE, Record
from lvsoftmax.cost import Work, count_work, release_free_memory

AXES = ("tokens", "hidden", "vocab", "precision", "threads")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        rounds: of a race.
        seconds: after which no further round starts.
        memory: whether to measure it, each contestant in a process of its own.
    """

    rounds: int
    seconds: float
    memory: bool


def plan(study: Mapping[str, Any], device: str, optim: str) -> tuple[list[Cell], list[Contestant]]:
    """Return the cells of a grid and who is timed in each.

    Raises:
        ValueError: a setting makes no grid.
    """
    for axis in (*AXES, "modes", "layers", "peers"):
        if not isinstance(study[axis], list):
            raise ValueError(f"study.{axis}={study[axis]}: must be a list; write study.{axis}=[{study[axis]}]")
    for mode in study["modes"]:
        if mode not in MODES:
            raise ValueError(f"study.modes={mode}: choose from {', '.join(MODES)}")
    threads = study["threads"] if torch.device(device).type == "cpu" else study["threads"][:1]
    values = [threads if axis == "threads" else study[axis] for axis in AXES]
    cells = [
        Cell(**dict(zip(AXES, point, strict=True)), device=device, optim=optim) for point in itertools.product(*values)
    ]
    contestants: list[Contestant] = [*peers(study["peers"]), *layers(study["layers"])]
    if not cells or not contestants:
        raise ValueError(f"study {study['name']} is empty; fill {', '.join(f'study.{axis}' for axis in AXES)}")
    return cells, contestants


def run(
    cells: Sequence[Cell],
    contestants: Sequence[Contestant],
    modes: Sequence[str],
    settings: Settings,
    advance: Callable[[float, str], None] = lambda share, text: None,
) -> Iterator[list[Record]]:
    """Yield the records of each cell.

    Args:
        cells: where.
        contestants: who; the limits of the machine are added.
        modes: what is timed.
        settings: how.
        advance: called with the share of a cell that has been done since the last call, and with what is done next.
    """
    everyone = [Products(), Copy(), *contestants]
    check = functools.cache(lambda contestant, cell: contestant.check(cell))
    for cell in cells:
        torch.set_num_threads(cell.threads)
        refused: dict[str, Record] = {}
        memories: dict[str, dict[str, Memory]] = {}
        for contestant in everyone:
            advance(0.5 / len(everyone), f"{contestant.label}: laws, memory")
            try:
                check(contestant, dataclasses.replace(cell, tokens=1, hidden=1, vocab=2))  # once for all sizes
                if settings.memory:
                    wanted = [mode for mode in ("train", "step") if mode in modes]
                    memories[contestant.label] = memory(contestant, cell, wanted or modes[:1])
            except Unavailable as reason:
                refused[contestant.label] = Record.refused(contestant, cell, reason)
        limit = allowance(cell.device)
        starters = [contestant for contestant in everyone if contestant.label not in refused]
        for contestant in outsized(starters, memories, limit):
            reason = f"takes {peak(contestant, memories) / 2**30:.1f} GiB in a step, too much beside the others"
            refused[contestant.label] = Record.refused(contestant, cell, Unavailable(reason))
            starters.remove(contestant)
        found: dict[str, Record] = {}
        for heat in heats(starters, memories, limit):
            fresh = [contestant for contestant in heat if contestant.label not in found]
            share = 0.5 * len(fresh) / len(everyone)
            for record in _heat(heat, cell, modes, settings, share, advance):
                found.setdefault(record.label, dataclasses.replace(record, memory=memories.get(record.label, {})))
        problem.cache_clear()
        yield [(refused | found)[contestant.label] for contestant in everyone]


Memories = Mapping[str, Mapping[str, Memory]]
"""What contestants were measured to take, by label and mode."""


def peak(contestant: Contestant, memories: Memories) -> int:
    """Return what a step takes at its highest point."""
    return max((one.peak for one in memories.get(contestant.label, {}).values()), default=0)


def needed(contestants: Sequence[Contestant], memories: Memories) -> int:
    """Return what contestants take together: what each has, keeps and reuses, and the step of the most demanding."""
    measured = [list(memories.get(contestant.label, {}).values()) for contestant in contestants]
    had = sum(
        max((one.resident for one in own), default=0) + sum(one.kept + one.waiting for one in own) for own in measured
    )
    return had + max((peak(contestant, memories) for contestant in contestants), default=0)


def references(contestants: Sequence[Contestant]) -> list[Contestant]:
    """Return those that others are compared to, who run in each heat."""
    return [each for each in contestants if each.kind == "limit" or each.label in (REFERENCE, OURS)]


def outsized(contestants: Sequence[Contestant], memories: Memories, limit: int | None) -> list[Contestant]:
    """Return those that do not fit into memory beside the ones they are compared to.

    Of these, the largest are among them where otherwise nobody could be compared.
    """
    if limit is None:
        return []
    compared, left_out = references(contestants), []
    others = [[each] for each in contestants if each not in compared] or [[]]
    while compared and all(needed([*compared, *other], memories) > limit for other in others):
        left_out.append(max(compared, key=lambda each: peak(each, memories)))
        compared.remove(left_out[-1])
    return [*left_out, *(each for other in others for each in other if needed([*compared, each], memories) > limit)]


def heats(contestants: Sequence[Contestant], memories: Memories, limit: int | None) -> list[list[Contestant]]:
    """Divide contestants into groups that fit into memory together; those that others are compared to run in each."""
    compared = references(contestants)
    groups: list[list[Contestant]] = [[]]
    for contestant in contestants:
        if contestant in compared:
            continue
        if groups[-1] and limit and needed([*compared, *groups[-1], contestant], memories) > limit:
            groups.append([])
        groups[-1].append(contestant)
    return [[*compared, *group] for group in groups]


def _heat(
    heat: Sequence[Contestant],
    cell: Cell,
    modes: Sequence[str],
    settings: Settings,
    share: float,
    advance: Callable[[float, str], None],
) -> Iterator[Record]:
    """Build, count and race a group."""
    runners: dict[tuple[str, str], Runner] = {}
    works: dict[str, Work | None] = {}
    records: list[Record] = []
    starters: list[Contestant] = []
    for contestant in heat:
        advance(0, f"{contestant.label}: building")
        # Those of the group before, and what was built to be counted, refer to themselves: they go when looked for.
        gc.collect()
        release_free_memory()
        try:
            with reported():
                instance = contestant.build(cell)
                wanted = ["train"] if contestant.kind == "limit" else [mode for mode in modes if mode in instance.modes]
                if not wanted:
                    raise Unavailable(f"has no mode {' or '.join(modes)}, only {', '.join(instance.modes)}")
                works[contestant.label] = work_of(contestant, instance, cell)
        except Unavailable as reason:
            records.append(Record.refused(contestant, cell, reason))
            continue
        starters.append(contestant)
        runners |= {(contestant.label, mode): Runner(instance, mode, cell) for mode in wanted}
    turn = share / max(1, len(runners) * (settings.rounds + 1))
    times = race(
        runners, rounds=settings.rounds, budget=settings.seconds, advance=lambda: advance(turn, f"racing at {cell}")
    )
    for contestant in starters:
        own = {mode: times[contestant.label, mode] for mode in MODES if (contestant.label, mode) in times}
        records.append(
            Record(
                cell,
                contestant.label,
                contestant.kind,
                parameters=runners[contestant.label, next(iter(own))].instance.parameters,
                work=works[contestant.label],
                times=own,
                ratios={mode: _ratios(mode, own[mode], times) for mode in own},
                clock=clock_of(cell)[0],
            )
        )
    yield from records


def _ratios(mode: str, own: Times, times: Mapping[tuple[str, str], Times]) -> dict[str, float]:
    return {
        label: own.over(times[label, mode]) for label in (REFERENCE, OURS, Products.label) if (label, mode) in times
    }


def work_of(contestant: Contestant, instance: Instance, cell: Cell) -> Work | None:
    """Count what one run of ``train`` makes PyTorch do; of a layer with several backends, of that in plain PyTorch.

    Returns:
        None for what has no such mode, or does its work out of PyTorch's sight.
    """
    if isinstance(contestant, Layer) and contestant.eager != contestant:
        instance = contestant.eager.build(cell)
    if "train" not in instance.modes or not instance.counted:
        return None
    batch = problem(cell).batches[0]
    work = count_work(lambda: instance.modes["train"](batch))
    instance.forget(batch)
    return work
