"""The benchmark's problem, and how time and memory are measured on it."""

import dataclasses
import gc
import math
import weakref

import pytest
import torch
from benchmarked import CELL

from experiments.bench import grid, limits, race
from experiments.bench.cell import Batch, Cell, Unavailable, problem, zipf_counts
from experiments.bench.contestants import Layer, layers, peers
from experiments.bench.race import Memory, Runner, Times


def test_words_are_zipf_s_and_no_batch_is_like_another():
    task = problem(Cell(tokens=20_000, hidden=1, vocab=1000))
    assert torch.equal(task.counts, zipf_counts(1000)) and task.counts[-1] == 4
    words = torch.cat([batch.target for batch in task.batches])
    share = words.bincount(minlength=1000)[:3] / len(words)
    expected = task.counts[:3] / task.counts.sum()
    assert torch.allclose(share, expected.float(), rtol=0.05)
    assert not torch.equal(task.batches[0].target, task.batches[1].target)
    assert problem(CELL) is problem(dataclasses.replace(CELL))


def test_a_race_of_many_cells_makes_the_problem_of_each_once():
    cells = [dataclasses.replace(CELL, tokens=tokens) for tokens in range(1, 21)]
    first = [problem(cell) for cell in cells]
    assert all(problem(cell) is task for cell, task in zip(cells, first, strict=True))
    problem.cache_clear()


def test_bf16_is_autocast_or_everything():
    auto, everything = (problem(dataclasses.replace(CELL, precision=p)) for p in ("bf16", "bf16_parameters"))
    assert auto.batches[0].hidden.dtype == everything.batches[0].hidden.dtype == torch.bfloat16
    kinds = []
    for precision in ("fp32", "bf16", "bf16_parameters"):
        instance = Layer("full_softmax").build(dataclasses.replace(CELL, precision=precision))
        kinds.append({parameter.dtype for parameter in instance.trained})
    assert kinds == [{torch.float32}, {torch.float32}, {torch.bfloat16}]


@pytest.mark.parametrize("tiling", [(8, 200), (3, 200), (8, 70), (3, 64)])
def test_the_products_are_those_of_a_dense_step(tiling):
    instance = limits.Products().build(CELL)
    batch = problem(CELL).batches[0]
    instance.room = torch.full((8 * 200,), math.nan)
    for gradient in (instance.grad_hidden, instance.grad_weight):
        gradient.fill_(math.nan)
    instance.run(batch, tiling)
    hidden, weight = batch.hidden.detach(), instance.weight
    torch.testing.assert_close(instance.grad_hidden, hidden @ weight.T @ weight)
    torch.testing.assert_close(instance.grad_weight, (hidden @ weight.T).T @ hidden)


class Counting:
    """An instance that notes when it ran."""

    parameters, counted, scale = 1, False, 2.0

    def __init__(self, name, log):
        self.modes = {"train": lambda batch: log.append(name)}

    def forget(self, batch: Batch) -> None:
        pass

    def gradient_bytes(self, batch: Batch) -> int:
        return 0


def test_a_race_takes_turns_and_the_first_round_does_not_count(monkeypatch):
    log, ticks = [], iter(range(1000))
    monkeypatch.setattr(race, "clock_of", lambda cell: ("ticks", lambda: float(next(ticks))))
    runners = {name: Runner(Counting(name, log), "train", CELL) for name in "abc"}
    times = race.race(runners, rounds=3, budget=100)
    assert "".join(log) == "abc" + "bca" + "cab" + "abc"
    assert times["a"].rounds == (2.0, 2.0, 2.0)  # a tick, scaled


def test_a_race_ends_when_time_is_up_but_not_before_three_rounds(monkeypatch):
    log = []
    monkeypatch.setattr(race, "SHORTEST", 0.0)
    race.race({"a": Runner(Counting("a", log), "train", CELL)}, rounds=50, budget=0.0)
    assert len(log) == 1 + 3


def test_what_is_fast_runs_more_than_once_in_its_turn():
    log = []
    race.race({"a": Runner(Counting("a", log), "train", CELL)}, rounds=1, budget=100)
    assert len(log) == 1 + race.MOST_RUNS


def test_numbers_of_threads_are_not_mixed():
    runners = {n: Runner(Counting("a", []), "train", dataclasses.replace(CELL, threads=n)) for n in (1, 2)}
    with pytest.raises(ValueError, match="numbers of threads"):
        race.race(runners, rounds=1, budget=1)
    assert race.clock_of(CELL)[0] == "CPU time"
    assert race.clock_of(dataclasses.replace(CELL, threads=2))[0] == "wall-clock time"


def test_ratios_are_taken_round_by_round():
    slow, fast = Times((2.0, 40.0, 9.0)), Times((1.0, 10.0, 9.0))
    assert slow.over(fast) == 2.0 and slow.median == 9.0 and slow.quartiles == (5.5, 24.5)


def test_memory_is_that_of_the_step_alone():
    cell = dataclasses.replace(CELL, tokens=32, vocab=131_072)
    (eager,) = peers(["PyTorch, eager"])
    found = race.memory(eager, cell, ["train", "step", "no such mode"])
    logits, table = 32 * 131_072 * 4, 131_072 * 17 * 4
    noise = 2**21  # of a process' resident set, which loads code as it goes on: a quarter of the table
    assert list(found) == ["train", "step"]
    train = found["train"]
    assert train.gradients == table + 32 * 16 * 4
    assert 2 * logits < train.peak < 4.5 * logits + 2 * table  # logits, their logarithm's softmax, gradients of both
    assert abs(train.resident - table) < noise
    assert abs(found["step"].kept - table) < noise  # the optimiser's state
    assert train.waiting == 0


def test_memory_for_reuse_is_told():
    """It stays while others race."""
    cell = dataclasses.replace(CELL, tokens=32, vocab=131_072)
    (ours,) = layers(["full_softmax"])
    (train,) = race.memory(ours, cell, ["train"]).values()
    weight = 131_072 * 16 * 4
    assert weight <= train.waiting < train.peak


def test_what_does_not_fit_or_fails_is_told(monkeypatch):
    cell = dataclasses.replace(CELL, tokens=256, vocab=100_000)
    (eager,) = peers(["PyTorch, eager"])
    monkeypatch.setattr(race, "allowance", lambda device: 100 * 2**20)
    with pytest.raises(Unavailable, match=r"takes more than 0\.1 GiB"):
        race.memory(eager, cell, ["train"])
    with pytest.raises(Unavailable, match="has no option colour"):
        race.memory(Layer("full_softmax", (("colour", 1),)), CELL, ["train"])


def test_heats_fit_into_memory_and_keep_the_references():
    contestants = [limits.Products(), *peers(["PyTorch, eager"]), *layers(["full_softmax"])]
    others = [Layer("sampled_softmax", (("samples", k),)) for k in (1, 2, 3)]
    sizes = {each.label: {"train": Memory(peak=10, kept=0, gradients=0, resident=10)} for each in contestants + others}
    assert grid.heats(contestants + others, sizes, None) == [contestants + others]
    first, second = grid.heats(contestants + others, sizes, 60)
    assert first == contestants + others[:2] and second == contestants + others[2:]
    assert grid.heats(contestants, {}, 60) == [contestants]
    reused = {label: {"train": own["train"]._replace(resident=7, waiting=3)} for label, own in sizes.items()}
    assert grid.heats(contestants + others, reused, 60) == [first, second]


def test_the_memory_of_a_group_is_free_before_the_next_is_built(monkeypatch):
    """Instances refer to themselves, and nobody looks for garbage meanwhile."""
    alive, found = weakref.WeakSet(), []
    plain = Layer.build

    def build(self, cell):
        found.append(len(alive))
        instance = plain(self, cell)
        alive.add(instance)
        return instance

    monkeypatch.setattr(Layer, "build", build)
    monkeypatch.setattr(grid, "heats", lambda starters, *_: [starters, starters])
    gc.disable()
    try:
        list(grid.run([CELL], layers(["class_softmax"]), ["train"], grid.Settings(1, 1.0, memory=False)))
    finally:
        gc.enable()
    assert found == [0, 1, 0, 1]  # in each group a second one is built, to be counted


def test_who_does_not_fit_beside_the_references_is_left_out():
    limit, eager, ours = limits.Products(), *peers(["PyTorch, eager"]), *layers(["full_softmax"])
    small, large = (Layer("sampled_softmax", (("samples", k),)) for k in (1, 2))
    peaks = {limit.label: 0, eager.label: 80, ours.label: 20, small.label: 5, large.label: 50}
    sizes = {label: {"train": Memory(peak=peak, kept=0, gradients=0, resident=10)} for label, peak in peaks.items()}
    everyone = [limit, eager, ours, small, large]
    assert grid.outsized(everyone, sizes, None) == []
    assert grid.outsized(everyone, sizes, 120) == []  # four times 10, and 80
    assert grid.outsized(everyone, sizes, 119) == [eager]  # without it all fit
    assert grid.outsized(everyone, sizes, 80) == [eager]
    assert grid.outsized(everyone, sizes, 79) == [eager, large]
    assert grid.outsized(everyone, sizes, 49) == [eager, ours, large]
    assert grid.outsized([limit, eager, ours], sizes, 110) == []
    assert grid.outsized([limit, eager, ours], sizes, 109) == [eager]
