"""The report's numbers: what is paired, in which order, what is said of it, what the tables hold."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_runs import comparison_of, make_run, names, quick_study, written

from experiments import report
from experiments.breakdown import Bands
from experiments.comparison import Stop, perplexity_at
from experiments.drawing import log_ticks


def test_same_folders_give_the_same_bytes(tmp_path):
    folders = quick_study(tmp_path / "runs") + [
        make_run(tmp_path / "runs", "full_softmax", seed=2),
        make_run(tmp_path / "runs", "sampled_softmax", corpus="ptb"),
        make_run(tmp_path / "runs", "sampled_softmax", digits="f", optim={"learning_rate": 0.2}, perplexity=200.0),
    ]
    written(folders, tmp_path / "one")
    written(folders[::-1] + folders[:1], tmp_path / "two")
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert {path.suffix for path in files} == {".html", ".csv", ".svg", ".pdf"} and len(files) >= 16
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_imports_no_torch():
    code = "import sys, experiments.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


def test_difference_and_speed_up_are_paired_by_seed(tmp_path):
    for seed, full, sampled, speed in ((1, 150.0, 160.0, 10_000.0), (2, 100.0, 120.0, 20_000.0)):
        make_run(tmp_path, "full_softmax", seed=seed, perplexity=full, speed=5000.0 * seed)
        make_run(tmp_path, "sampled_softmax", seed=seed, perplexity=sampled, speed=speed)
    make_run(tmp_path, "sampled_softmax", seed=3, perplexity=900.0, speed=1.0)  # has no full softmax beside it
    comparison = comparison_of(tmp_path.glob("*/*"))
    full, sampled = comparison.rows
    assert comparison.reference is full
    difference = sampled.cells["difference"]
    assert difference.mean == pytest.approx((16 / 15 * 12 / 10) ** (1 / 2) - 1) and difference.number == 2
    assert sampled.cells["speed_up"].mean == pytest.approx(2.0)
    assert sampled.cells["test"].mean == pytest.approx((160 * 120 * 900) ** (1 / 3))
    assert full.cells["difference"].mean == 0 and full.cells["speed_up"].mean == pytest.approx(1)


@pytest.mark.parametrize("limit", [{"tokens": 1_000_000}, {"seconds": 200.0}], ids=["in text", "in time"])
def test_a_layer_of_another_machine_has_no_speed_up_and_in_equal_time_no_verdict(tmp_path, limit):
    budget, in_time = {"epochs": None, "tokens": None, "seconds": None} | limit, "seconds" in limit
    for seed in (1, 2, 3):
        make_run(tmp_path, "full_softmax", seed=seed, perplexity=150.0 + seed, budget=budget)
        make_run(tmp_path, "sampled_softmax", seed=seed, perplexity=160.0 + seed, speed=10_000.0, budget=budget)
        make_run(tmp_path, "class_softmax", seed=seed, perplexity=170.0 + seed, budget=budget, processor="Another")
    comparison = comparison_of(tmp_path.glob("*/*"))
    full, sampled, classes = comparison.rows
    assert comparison.reference is full and comparison.elsewhere == [classes]
    assert sampled.verdict == "worse" and sampled.cells["speed_up"].mean == pytest.approx(2.0)
    assert classes.cells["speed_up"] is None and classes.verdict == ("" if in_time else "worse")
    assert (classes.difference is None) == (classes.cells["difference"] is None) == in_time
    losses = {row.label: values for row, values in Bands.of(comparison).rows}
    assert (losses["Class softmax"] == [None] * 5) == in_time and None not in losses["Sampled softmax"]
    notes = report.caveats(comparison)
    lost = "in equal time no verdict, and no speed-up" if in_time else "no speed-up"
    assert f"Class softmax trained on other machines than full softmax's runs: {lost}." in notes
    assert not any("No verdict on" in note for note in notes)


def test_in_equal_time_only_seeds_of_one_machine_are_paired(tmp_path):
    budget = {"epochs": None, "tokens": None, "seconds": 200.0}
    for seed in (1, 2, 3):
        make_run(tmp_path, "full_softmax", seed=seed, budget=budget)
        processor = "Another" if seed == 3 else "A processor"
        make_run(tmp_path, "sampled_softmax", seed=seed, perplexity=160.0, budget=budget, processor=processor)
    comparison = comparison_of(tmp_path.glob("*/*"))
    sampled = comparison.rows[1]
    assert sampled.difference.interval.number == sampled.cells["speed_up"].number == 2 and not comparison.elsewhere
    (note,) = [note for note in report.caveats(comparison) if note.startswith("No verdict on sampled softmax")]
    assert note.endswith("seeds that full softmax has, too, on the same machine.")


def test_rows_are_in_order_of_perplexity_and_the_best_of_each_column_is_marked(tmp_path):
    comparison = written(quick_study(tmp_path / "runs"), tmp_path)
    means = [row.cells["test"].mean for row in comparison.rows]
    assert means == sorted(means)
    page = (tmp_path / "report.html").read_text()
    best = re.findall(r'class="best">([^<]*)<', page)
    assert best[0] == "152.3" and "23,800" in best and "4.7×" in best and "890\u00a0MB" in best
    assert "620.0" in page.split("<tfoot>")[1].split("</tfoot>")[0]


def test_answer_names_who_wins_at_what(tmp_path):
    folders = quick_study(tmp_path)
    assert report.sentence(comparison_of(folders)).replace("\u00a0", " ") == (
        "Full softmax predicts best (test perplexity 152.3); hierarchical softmax trains fastest (4.7× full softmax's "
        "speed); adaptive softmax needs the least memory (890 MB at its peak, full softmax 1,240 MB)."
    )
    both = [
        make_run(tmp_path, "full_softmax", digits="b", perplexity=200.0, speed=1.0, peak_bytes=1000),
        make_run(tmp_path, "sampled_softmax", digits="b", perplexity=100.0, speed=2.0),
    ]
    assert report.sentence(comparison_of(both)).startswith(
        "Sampled softmax predicts best (test perplexity 100.0) and trains fastest (2.0× full softmax's speed); full"
    )


def test_one_seed_is_said_and_no_verdict_given(tmp_path):
    notes = report.caveats(comparison_of(quick_study(tmp_path)))
    assert any("One seed" in note for note in notes)
    make_run(tmp_path, "full_softmax", seed=2)
    make_run(tmp_path, "sampled_softmax", seed=2)
    comparison = comparison_of(tmp_path.glob("*/*"))
    assert any("No verdict on" in note for note in report.caveats(comparison)) and not comparison.has_verdicts
    assert "verdict" not in report.sentence(comparison)


def test_equal_time_under_a_budget_of_tokens_and_equal_tokens_under_one_of_seconds(tmp_path):
    fast = make_run(tmp_path / "tokens", "sampled_softmax", speed=20_000)
    slow = make_run(tmp_path / "tokens", "full_softmax", speed=5000)
    comparison = comparison_of([fast, slow])
    assert (comparison.stop.axis, comparison.stop.value) == ("seconds", 50.0)
    # full softmax has read a quarter of its tokens then: its fifth validation of twenty
    full = next(row for row in comparison.rows if row.label == "Full softmax")
    assert full.cells["at_stop"].mean == pytest.approx(full.runs[0].curve[4]["perplexity"])
    budget = {"epochs": None, "tokens": None, "seconds": 200.0}
    fast = make_run(tmp_path / "seconds", "sampled_softmax", speed=20_000, tokens=4_000_000, budget=budget)
    slow = make_run(tmp_path / "seconds", "full_softmax", speed=5000, tokens=1_000_000, budget=budget)
    comparison = comparison_of([fast, slow])
    assert (comparison.stop.axis, comparison.stop.value) == ("tokens", 1_000_000)


def test_layers_whose_validations_begin_later_are_named_and_have_no_mean_of_some_seeds(tmp_path):
    budget = {"epochs": None, "tokens": None, "seconds": 200.0}
    speeds = {"full_softmax": (5000, 5000), "sampled_softmax": (10_000, 10_000), "adaptive_softmax": (150_000, 150_000),
              "class_softmax": (50_000, 200_000)}  # fmt: skip
    folders = [
        make_run(tmp_path, layer, seed=seed, speed=speed, tokens=200 * speed, budget=budget)
        for layer, both in speeds.items() for seed, speed in enumerate(both, 1)
    ]  # fmt: skip
    comparison = comparison_of(folders)
    assert (comparison.stop.axis, comparison.stop.value) == ("tokens", 1_000_000)
    # A twentieth of their tokens is more than that, for class softmax in one of its seeds.
    assert [row.label for row in comparison.rows if row.cells["at_stop"]] == ["Full softmax", "Sampled softmax"]
    (note,) = [note for note in report.caveats(comparison) if note.startswith("After equal training text")]
    assert note.endswith(" No validation of adaptive softmax and class softmax is that early.")


def test_a_run_ends_with_its_training_and_not_with_its_last_finite_validation(tmp_path):
    folders = [make_run(tmp_path, layer, speed=speed) for layer, speed in
               (("full_softmax", 5000), ("sampled_softmax", 20_000), ("entmax_output", 10_000))]  # fmt: skip
    lines = [json.loads(line) for line in (folders[1] / "metrics.jsonl").read_text().splitlines()]
    for line in lines[20:]:
        line["perplexity"] = "Infinity"
    (folders[1] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    comparison = comparison_of(folders)
    assert (comparison.stop.axis, comparison.stop.value) == ("seconds", 50.0)  # and not 25
    cells = {row.label: row.cells["at_stop"] for row in comparison.rows}
    assert cells["Sampled softmax"] is None and cells["Entmax output"] and cells["Full softmax"]


def test_halfway_between_two_validations_on_logarithmic_axes_perplexity_is_their_geometric_mean():
    curve = [{"seconds": 10.0, "perplexity": 400.0}, {"seconds": 30.0, "perplexity": 100.0}]
    assert perplexity_at(curve, Stop("seconds", 300**0.5)) == pytest.approx(200.0)
    assert perplexity_at(curve, Stop("seconds", 20.0)) == pytest.approx(400 * 4 ** -(math.log(2) / math.log(3)))
    assert perplexity_at(curve, Stop("seconds", 30.0)) == pytest.approx(100.0)
    assert perplexity_at(curve, Stop("seconds", 31.0)) is None
    assert perplexity_at(curve[:1], Stop("seconds", 10.0)) == 400.0
    assert perplexity_at([curve[0], curve[0], curve[1]], Stop("seconds", 10.0)) == pytest.approx(400.0)
    begun = [{"seconds": 0.0, "perplexity": 400.0}, {"seconds": 30.0, "perplexity": 100.0}]
    assert perplexity_at(begun, Stop("seconds", 15.0)) == pytest.approx(200.0)
    assert perplexity_at(begun, Stop("seconds", 0.0)) == pytest.approx(400.0)


def test_variants_of_a_layer_are_rows_of_their_own(tmp_path):
    make_run(tmp_path, "sampled_softmax", output={"noise": "uniform", "samples": 8})
    make_run(tmp_path, "sampled_softmax", output={"noise": "unigram", "samples": 8}, digits="f", perplexity=160.0)
    comparison = comparison_of(tmp_path.glob("*/*"))
    assert names(comparison) == ["Sampled softmax (noise=uniform)", "Sampled softmax (noise=unigram)"]


def test_csv_holds_one_unrounded_line_per_run(tmp_path):
    folders = quick_study(tmp_path / "runs")
    folders.append(make_run(tmp_path / "runs", "spherical_softmax", status="diverged"))
    written(folders, tmp_path)
    lines = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert len(lines) == 7 and lines[0]["revision"] == "5d221a0000" and lines[0]["machine"] == "A processor, 2 threads"
    assert lines[0]["layer"] == "full_softmax" and float(lines[0]["test_nll"]) == math.log(152.3)
    assert lines[-1]["status"] == "diverged" and lines[-1]["test_perplexity"] == ""


@pytest.mark.parametrize("low, high", [(150, 490), (90, 110), (10, 100_000), (3, 3.1), (100, 100), (7, 2000)])
def test_ticks_are_few_and_inside(low, high):
    ticks = log_ticks(low, high)
    assert ticks == sorted(ticks) and len(ticks) <= 12
    assert all(low <= tick <= high for tick in ticks)


def test_command_line_prints_the_table_and_the_page(tmp_path, capsys, monkeypatch):
    folders = quick_study(tmp_path / "runs")
    shutil.rmtree(folders[-1] / "checkpoints")
    monkeypatch.setattr(sys, "argv", ["report", *map(str, folders), str(tmp_path), "--output", str(tmp_path / "out")])
    report.main()
    printed = capsys.readouterr().out
    assert "Hierarchical softmax" in printed and "left out: " in printed and "out/report.html" in printed
    assert (tmp_path / "out" / "results.csv").exists()
