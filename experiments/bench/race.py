"""Time and memory: side by side in one process, and one by one in fresh ones."""

import contextlib
import dataclasses
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments.bench.cell import Cell, Instance, Unavailable, problem
from experiments.bench.contestants import Contestant
from experiments.bench.laws import reported
from lvsoftmax.cost import extra_bytes, peak_bytes, release_free_memory, reset_peak, seconds
from lvsoftmax.ops import buffers

FEWEST_ROUNDS = 3
SHORTEST = 0.02
"""Seconds: what is faster is run again within its turn."""
MOST_RUNS = 20
"""Within a turn."""

MEMORY_SHARE = 0.6
"""Of the memory that is free: what a contestant may take."""
MEMORY_SECONDS = 600
"""After which a measurement of memory is given up."""
PATIENCE = 5
"""Seconds for a process to end by itself."""


class Times(NamedTuple):
    """Seconds of one run, over the rounds of a race."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Over the rounds."""
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third."""
        if len(self.rounds) < 2:
            return self.rounds[0], self.rounds[0]
        first, _, third = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return first, third

    def over(self, other: "Times") -> float:
        """Return the ratio to another's times: the median of the ratios within a round."""
        return statistics.median(own / their for own, their in zip(self.rounds, other.rounds, strict=True))


@dataclasses.dataclass(frozen=True)
class Runner:
    """An instance in one of its modes, in the cell that it was built for."""

    instance: Instance
    mode: str
    cell: Cell

    def time(self, turn: int, clock: Callable[[], float]) -> float:
        """Run on the batch whose turn it is and return the seconds."""
        batches = problem(self.cell).batches
        batch = batches[turn % len(batches)]
        spent = seconds(lambda: self.instance.modes[self.mode](batch), torch.device(self.cell.device), clock)
        self.instance.forget(batch)
        return spent * self.instance.scale


def clock_of(cell: Cell) -> tuple[str, Callable[[], float]]:
    """Return the clock to use, and its name.

    With one thread that is the time that the CPU worked for this process; what else runs on the machine then counts
    through the caches only.
    """
    if cell.device == "cpu" and cell.threads == 1:
        return "CPU time", time.process_time
    return "wall-clock time", time.perf_counter


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let no garbage be looked for meanwhile, and no memory leave that a contestant's next turn would have to touch."""
    collected = gc.isenabled()
    gc.disable()
    gc.freeze()  # what was there before is not looked through when garbage is asked for
    try:
        with buffers.kept():
            yield
    finally:
        gc.unfreeze()
        if collected:
            gc.enable()


def race(
    runners: Mapping[Any, Runner], *, rounds: int, budget: float, advance: Callable[[], Any] = lambda: None
) -> dict[Any, Times]:
    """Time everybody, round by round in turning order, after a warm-up.

    Args:
        runners: who; all with the same number of threads.
        rounds: how many, fewer if time is up.
        budget: seconds of wall-clock time after which no further round starts, once there have been three.
        advance: called after each turn, for a progress bar; the warm-up is a round.

    Returns:
        The times of each, a number per round: the median of the runs within a turn.
    """
    cells = {runner.cell.threads: runner.cell for runner in runners.values()}
    if len(cells) > 1:
        raise ValueError(f"a race with different numbers of threads: {sorted(cells)}")
    keys = list(runners)
    found: dict[Any, list[float]] = {key: [] for key in keys}
    start = time.perf_counter()
    with _undisturbed():
        for number in range(rounds + 1):
            if number > FEWEST_ROUNDS and time.perf_counter() - start > budget:
                break
            gc.collect()
            for place in range(len(keys)):
                key = keys[(place + number) % len(keys)]
                runner = runners[key]
                torch.set_num_threads(runner.cell.threads)
                _, clock = clock_of(runner.cell)
                turn: list[float] = []
                while not turn or (number and sum(turn) < SHORTEST and len(turn) < MOST_RUNS):
                    turn.append(runner.time(number + len(turn), clock))
                if number:
                    found[key].append(statistics.median(turn))
                advance()
    return {key: Times(tuple(times)) for key, times in found.items()}


class Memory(NamedTuple):
    """Bytes of one run in a process of its own.

    The run measured is the second one; what the first one left behind for good (buffers, the optimiser's state) is
    told apart from what came on top.
    """

    peak: int
    """At the highest point beyond what was in use before the run."""
    kept: int
    """Beyond what was in use before the first run."""
    gradients: int
    """Of the gradients that it leaves behind; they are in ``peak``."""
    resident: int
    """Of the instance before it ever ran: parameters and buffers."""
    waiting: int = 0
    """For reuse, after a run: it is in ``peak``, and while others race nothing of it is given back."""


def memory(contestant: Contestant, cell: Cell, modes: Sequence[str]) -> dict[str, Memory]:
    """Measure a run in each of those of the modes that there are, one after the other.

    On the CPU that is the resident set of a fresh process, on CUDA what the allocator gave out.

    Raises:
        Unavailable: it takes more memory than there should be for it, or fails.
    """
    if torch.device(cell.device).type == "cuda":
        with reported():
            found = _measure(contestant, cell, modes)
        torch.cuda.empty_cache()
        return found
    context = multiprocessing.get_context(START_METHOD)
    if START_METHOD == "forkserver":
        context.set_forkserver_preload(["experiments.bench.contestants", "torch._dynamo"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, contestant, cell, modes, allowance(cell.device)), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(MEMORY_SECONDS):
            raise Unavailable(f"did not end within {MEMORY_SECONDS} s")
        found = here.recv()
    except EOFError:
        process.join()
        raise Unavailable(f"ended its process with status {process.exitcode}") from None
    finally:
        process.join(PATIENCE)  # killed at once, it would leave its semaphores behind
        process.kill()
        process.join()
        here.close()
    if isinstance(found, str):
        raise Unavailable(found)
    return found


START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
"""A server that has imported everything (optimisers import torch's compiler) and done nothing else forks in no time."""


def allowance(device: str) -> int | None:
    """Return how many bytes contestants may take together; None where the system does not say what is free."""
    if torch.device(device).type == "cuda":
        return int(MEMORY_SHARE * torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return int(MEMORY_SHARE * free)


def _child(pipe: Connection, contestant: Contestant, cell: Cell, modes: Sequence[str], allowed: int | None) -> None:
    """Send what ``memory`` returns, or in words why there is nothing."""
    try:
        if allowed is not None:
            _limit_memory(allowed)
        answer: Any = _measure(contestant, cell, modes)
    except Unavailable as reason:
        answer = str(reason)
    except Exception as error:
        if allowed is not None and ("memory" in str(error) or isinstance(error, MemoryError)):
            answer = f"takes more than {allowed / 2**30:.1f} GiB"
        else:
            answer = f"fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    with contextlib.suppress(BrokenPipeError):  # nobody is waiting any more
        pipe.send(answer)


def _limit_memory(allowed: int) -> None:
    import resource  # where there is a /proc/meminfo, there is this

    lines = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + allowed, used + allowed))


def _measure(contestant: Contestant, cell: Cell, modes: Sequence[str]) -> dict[str, Memory]:
    torch.set_num_threads(cell.threads)
    device = torch.device(cell.device)
    first, second = problem(cell).batches[:2]
    # A small one first, so that code is loaded and libraries have made their own buffers.
    small = dataclasses.replace(cell, tokens=16, hidden=16, vocab=10_007)
    _run_once(contestant.build(small), small, modes)
    empty = _in_use(device)
    instance = contestant.build(cell)
    resident = max(0, _in_use(device) - empty)
    found = {}
    for mode in modes:
        if mode not in instance.modes:
            continue
        before = _in_use(device)
        with buffers.kept():
            instance.modes[mode](first)
            instance.forget(first)
        waiting = buffers.waiting()
        kept = max(0, _in_use(device) - before)
        peak = extra_bytes(lambda mode=mode: instance.modes[mode](second), device)
        found[mode] = Memory(peak, kept, instance.gradient_bytes(second), resident, waiting)
        instance.forget(second)
    return found


def _run_once(instance: Instance, cell: Cell, modes: Sequence[str]) -> None:
    batch = problem(cell).batches[0]
    for mode in modes:
        if mode in instance.modes:
            instance.modes[mode](batch)
            instance.forget(batch)


def _in_use(device: torch.device) -> int:
    release_free_memory()
    reset_peak(device)
    return peak_bytes(device)
