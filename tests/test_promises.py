"""The promises of speed: each is judged by the figure that it names."""

import csv
import dataclasses
import math

import pytest
from benchmarked import CELL

from experiments.bench import goals, limits, page
from experiments.bench.cell import Unavailable
from experiments.bench.contestants import Layer
from experiments.bench.promises import promises
from experiments.bench.race import Memory, Times


def found_in_a_race(**medians):
    """Times in which everybody takes the same in each round."""
    times = {key: Times((median,) * 3) for key, median in medians.items()}
    memories = {"a": Memory(peak=50 * 2**20, kept=2**20, gradients=20 * 2**20, resident=0)}
    return goals.Measured(times, memories, {"lost": Unavailable("not there: no such output layer")})


@pytest.mark.parametrize(
    ("line", "measured", "status"),
    [
        (goals.Line("1a", "", goals.ratio("a", "b"), at_most=2.0), 2.0, "pass"),
        (goals.Line("1a", "", goals.ratio("a", "b"), at_most=1.9), 2.0, "miss"),
        (goals.Line("1a", "", goals.ratio("a", "b"), at_least=2.0), 2.0, "pass"),
        (goals.Line("1a", "", goals.ratio("a", "b"), at_least=2.1), 2.0, "miss"),
        (goals.Line("7a", "", goals.ratio("a", "b"), at_least=2.1, stretch=True), 2.0, "short of it"),
        (goals.Line("5a", "", goals.percentage("b", "a"), at_most=40), 50.0, "miss"),
        (goals.Line("2c", "", goals.ratio_or_less("lost", "a", "b"), at_least=2), 2.0, "pass"),
        (goals.Line("2c", "", goals.ratio_or_less("c", "a", "b"), at_least=2), 4.0, "pass"),
        (goals.Line("1b", "", goals.beyond_gradients("a"), at_most=31), 31.0, "pass"),
        (goals.Line("5b", "", goals.beyond_state("a"), at_most=49), 50.0, "miss"),
        (goals.Line("6c", "", goals.worst_ratio([("c", "b"), ("a", "b")]), at_least=3), 2.0, "miss"),
        (goals.Line("5c", "", goals.exponent({10: "b", 100: "a", 1000: "c"}), at_most=0.31), math.log10(2), "pass"),
        (goals.Line("4a", "", goals.ratio("a", "lost"), at_least=2), None, "not there"),
        (goals.Line("1b", "", goals.beyond_gradients("b"), at_most=2), None, "unmeasured"),
        (goals.Line("1h", "", goals.ratio("a", "b"), at_most=2, hurdle="no such CPU"), None, "unmeasured"),
    ],
)
def test_a_promise_is_judged_by_its_figure(line, measured, status):
    result = line.judged(found_in_a_race(a=2.0, b=1.0, c=4.0))
    assert result.status == status
    assert result.value == (None if measured is None else pytest.approx(measured))


@pytest.mark.usefixtures("without_type_checks")
def test_promises_are_measured_in_one_race_and_missing_layers_named():
    entrants = {"exact": goals.Entrant(Layer("full_softmax"), CELL, measured=True),
                "products": goals.Entrant(limits.Products(), CELL),
                "lost": goals.Entrant(Layer("no_such_softmax"), CELL),
                "idle": goals.Entrant(Layer("full_softmax"), CELL)}  # fmt: skip
    lines = [goals.Line("1a", "exact", goals.ratio("exact", "products"), at_most=1e9),
             goals.Line("1b", "exact", goals.beyond_gradients("exact"), at_most=1e9),
             goals.Line("2a", "lost", goals.ratio("products", "lost"), at_least=1)]  # fmt: skip
    results, behind = goals.measured(goals.Race("N 8", entrants, lines), rounds=1, seconds=1)
    assert [result.status for result in results] == ["pass", "pass", "not there"]
    assert results[0].value > 0 and results[0].line.text == "exact, N 8"
    assert [record.label for record in behind] == ["full_softmax", "three products", "no_such_softmax"]
    table = goals.table(results)
    assert "not there: no such output layer" in table and "at most" in table
    read = list(csv.DictReader(goals.to_csv(results).splitlines()))
    assert [line["status"] for line in read] == ["pass", "pass", "not there"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_line_of_the_promises_names_entrants_of_its_race(device):
    races = promises(device, "adagrad", 1)
    names = [line.name for race in races for line in race.lines]
    assert len(names) == len(set(names))
    for one in races:
        assert {key for line in one.lines for key in line.figure.needs} <= set(one.entrants)
        assert all((line.at_most is None) != (line.at_least is None) for line in one.lines)
    expected = {"cpu": "1a 1b 1c 1d 1e 1f 1g 1h 2a 2b 2c 2d 2e 2f 3a 3b 4a 4b 4c 4d 5a 5b 5c 5d 5e 5f 7a 7b 7c",
                "cuda": "6a 6b 6c 6d 6e 6f 6g 6h"}  # fmt: skip
    assert sorted(names) == expected[device].split()


def test_lines_are_chosen_by_number_or_by_name():
    races = goals.chosen(promises("cpu", "adagrad", 1), [3, "2c"])
    assert sorted(line.name for race in races for line in race.lines) == ["2c", "3a", "3b"]
    with pytest.raises(ValueError, match="study.lines=6: no such line here; choose from 1a, 1b"):
        goals.chosen(promises("cpu", "adagrad", 1), [6])


def test_the_page_of_promises_counts_them():
    environment = {"processor": "a processor", "device": "cpu", "versions": {"torch": "2"}, "config": {"rounds": 3}}
    line = goals.Line("1a", "exact", goals.ratio("a", "b"), at_most=2.0)
    kept, missed = line.judged(found_in_a_race(a=1.0, b=1.0)), line.judged(found_in_a_race(a=3.0, b=1.0))
    stretch = dataclasses.replace(line, stretch=True).judged(found_in_a_race(a=3.0, b=1.0))
    lost = dataclasses.replace(line, hurdle="no such CPU").judged(found_in_a_race())
    text = page.html("Promises", environment, [], [kept, missed, stretch, lost])
    assert "1 of 3 promises are kept, 1 are missed, 1 could not be measured." in text
    assert "no such CPU" in text and "at most 2×" in text and len(text) < 100_000
