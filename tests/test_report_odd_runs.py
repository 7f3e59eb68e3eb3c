"""What the report makes of folders that are damaged, runs that diverged, words without probability, few runs."""

import csv
import html
import json
import math
import re

import pytest
from synthetic_runs import change_result, comparison_of, make_run, names, written

from experiments import drawing, report
from experiments.breakdown import Bands
from experiments.comparison import survey


def no_config(folder):
    (folder / "config.yaml").unlink()


def no_result(folder):
    (folder / "result.json").unlink()


def no_metrics(folder):
    (folder / "metrics.jsonl").unlink()


def half_a_line(folder):
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[:-30])


def half_a_result(folder):
    (folder / "result.json").write_text((folder / "result.json").read_text()[:100])


def result_without_memory(folder):
    change_result(folder, lambda result: result.pop("memory"))


def words_for_numbers(folder):
    change_result(folder, lambda result: result["valid"].update(perplexity="high"))


def words_for_a_count(folder):
    change_result(folder, lambda result: result["train"].update(tokens="many"))


def result_is_a_list(folder):
    (folder / "result.json").write_text("[]")


def binary_config(folder):
    (folder / "config.yaml").write_bytes(b"\xff\xfe\x00")


def config_of_something_else(folder):
    (folder / "config.yaml").write_text("- 1\n- 2\n")


def other_vocabulary(folder):
    change_result(folder, lambda result: result.update(vocabulary=17_999))


def other_test_text(folder):
    change_result(folder, lambda result: result["test"].update(tokens=24_999))


def other_corpus(folder):
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("data: sotu", "data: ptb"))


def perplexity_below_zero(folder):
    change_result(folder, lambda result: result["test"].update(perplexity=-3))


def no_speed(folder):
    change_result(folder, lambda result: result["train"].update(tokens_per_second=0))


def null_for_memory(folder):
    change_result(folder, lambda result: result["memory"].update(peak_bytes=None))


def loss_of_another_perplexity(folder):
    change_result(folder, lambda result: result["test"].update(nll=1.0))


def no_seed(folder):
    change_config(folder, "seed: 1", "seed: null")


def words_for_a_budget(folder):
    change_config(folder, "tokens: 1000000", "tokens: many")


def text_without_a_name(folder):
    change_config(folder, "data: sotu", "data: null")


def change_config(folder, old, new):
    text = (folder / "config.yaml").read_text()
    assert text.count(old) == 1
    (folder / "config.yaml").write_text(text.replace(old, new))


FAULTS = {
    no_config: "no run folder",
    no_result: "not finished",
    no_metrics: "not finished",
    half_a_line: "damaged",
    half_a_result: "damaged",
    result_without_memory: "damaged",
    words_for_numbers: "damaged",
    words_for_a_count: "damaged: train_tokens is 'many'",
    result_is_a_list: "damaged",
    binary_config: "damaged",
    config_of_something_else: "damaged",
    perplexity_below_zero: "damaged: test_perplexity is -3",
    no_speed: "damaged: train_tokens_per_second is 0",
    null_for_memory: "damaged: peak_bytes is None",
    loss_of_another_perplexity: "damaged: a test perplexity of 150 is not that of a loss of 1 nats",
    no_seed: "damaged: seed is None",
    words_for_a_budget: "damaged: budget.tokens is 'many'",
    text_without_a_name: "damaged: name.data is None",
    other_vocabulary: "vocabulary is 17999, here 18000",
    other_test_text: "number of test tokens",
    other_corpus: "nothing else was run on ptb",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faulty_folders_are_left_out_by_name(tmp_path, fault):
    folders = [make_run(tmp_path / "runs", layer) for layer in ("full_softmax", "sampled_softmax", "adaptive_softmax")]
    fault(folders[0])
    found = report.write(folders, tmp_path, "Study", results=tmp_path / "nothing")
    (comparison,) = found.comparisons
    assert names(comparison) == ["Adaptive softmax", "Sampled softmax"]
    ((name, reason),) = found.left_out
    assert name == "sotu/full_softmax-lstm-seed1-0123abcd" and FAULTS[fault] in reason and "\n" not in reason
    page = (tmp_path / "report.html").read_text()
    assert name in page and html.escape(FAULTS[fault]).replace("&#x27;", "&#39;") in page


def test_unequal_conditions_are_said(tmp_path):
    make_run(tmp_path, "full_softmax")
    make_run(tmp_path, "sampled_softmax", model={"backbone": {"hidden_size": 512}})
    notes = report.caveats(comparison_of(tmp_path.glob("*/*")))
    assert any("differ in more than layer and seed: model.backbone.hidden_size" in note for note in notes)


def test_a_diverged_run_is_shown_as_diverged(tmp_path):
    folders = [
        make_run(tmp_path / "runs", "full_softmax"),
        make_run(tmp_path / "runs", "hierarchical_softmax", seed=1),
        make_run(tmp_path / "runs", "hierarchical_softmax", seed=2, status="diverged"),
        make_run(tmp_path / "runs", "sampled_softmax", status="diverged"),
    ]
    comparison = written(folders, tmp_path)
    notes = {row.label: row.note for row in comparison.rows}
    assert notes["Hierarchical softmax"] == "1 of 2 seeds diverged"
    assert notes["Sampled softmax"] == "diverged at step 750"
    assert names(comparison)[-1] == "Sampled softmax" and comparison.rows[-1].cells["test"] is None
    assert "diverged at step 750" in (tmp_path / "report.html").read_text()
    assert "diverged" in report.text_table(survey(folders, ""))


def test_a_layer_that_gives_words_no_probability_is_compared_by_its_smoothed_perplexity(tmp_path):
    runs = tmp_path / "runs"
    folders = [
        make_run(runs, "full_softmax", perplexity=150.0),
        make_run(runs, "sparsemax_output", perplexity=180.0, coverage=0.985, seed=1),
        make_run(runs, "sparsemax_output", perplexity=190.0, coverage=0.975, seed=2),
        make_run(runs, "entmax_output", perplexity=160.0, coverage=0.999),
        make_run(runs, "sampled_softmax", status="diverged"),
    ]
    comparison = written(folders, tmp_path)
    assert names(comparison) == ["Full softmax", "Entmax output", "Sparsemax output", "Sampled softmax"]
    assert [row.note for row in comparison.rows][1:3] == ["", ""]
    sparsemax = comparison.rows[2].cells
    assert sparsemax["test"].mean == math.inf and sparsemax["difference"].mean == pytest.approx(180 / 150 - 1)
    assert sparsemax["smoothed"].mean == pytest.approx((180 * 190) ** 0.5 * 1.002)
    assert sparsemax["coverage"].mean == pytest.approx(0.98)
    assert comparison.best["test"] == pytest.approx(150) and comparison.best["smoothed"] == pytest.approx(150 * 1.002)
    table = report.text_table(survey(folders, ""))
    assert re.search(r"Sparsemax output +∞ +185\.3 +98\.00\xa0% +\+20\.0\xa0%", table), table
    assert re.search(r"Full softmax +150\.0 +150\.3 +100\xa0%", table), table
    page = (tmp_path / "report.html").read_text()
    assert 'data-value="Infinity"' in page and 'data-value="inf"' not in page and "∞" in page
    assert any(
        "entmax output (0.10\xa0%) and sparsemax output (2.00\xa0%)" in note for note in report.caveats(comparison)
    )
    losses = {row.label: losses for row, losses in Bands.of(comparison).rows}
    assert losses["Sparsemax output"][-1] == math.inf and math.isfinite(losses["Sparsemax output"][0])
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [row["test_perplexity"] for row in rows] == ["150.0", "inf", "inf", "inf", ""]
    assert float(rows[1]["test_coverage"]) == 0.999


def test_where_one_layer_is_ranked_by_smoothed_perplexity_all_are(tmp_path):
    folders = [
        make_run(tmp_path, "full_softmax", perplexity=150.0, speed=5000),
        make_run(tmp_path, "sparsemax_output", perplexity=149.9, speed=2500, coverage=0.99),
        make_run(tmp_path, "sampled_softmax", perplexity=160.0, speed=2000),
    ]
    comparison = comparison_of(folders)
    full, sparsemax = (150 * 1.002, 149.9 * 1.002)  # by exact perplexity on one side only, full softmax were ahead
    frontier = comparison.frontier(comparison.seconds)
    assert [(row.label, comparison.level(row)) for row in frontier] == [
        ("Full softmax", pytest.approx(full)), ("Sparsemax output", pytest.approx(sparsemax))
    ]  # fmt: skip
    chart = drawing.frontier_chart(comparison, "seconds")
    assert chart.y.title == "smoothed perplexity"
    assert {line.label: list(line.y) for line in chart.lines if line.label} == {
        "Full softmax": [pytest.approx(full)], "Sparsemax output": [pytest.approx(sparsemax)],
        "Sampled softmax": [pytest.approx(160 * 1.002)],
    }  # fmt: skip
    assert drawing.frontier_chart(comparison_of(folders[::2]), "seconds").y.title == "test perplexity"


def test_losses_of_one_kind_are_compared_though_words_lack_probability_in_some_seeds_only(tmp_path):
    folders = [make_run(tmp_path, "full_softmax", seed=seed, perplexity=150.0) for seed in (1, 2, 3)]
    folders += [
        make_run(tmp_path, "sparsemax_output", seed=seed, perplexity=150.0, coverage=coverage)
        for seed, coverage in ((1, 0.99), (2, 0.99), (3, 1.0))
    ]
    gap = comparison_of(folders).rows[-1].cells["difference"]
    assert (gap.mean, gap.low, gap.high) == pytest.approx((0, 0, 0), abs=1e-12)


def test_without_such_a_layer_the_table_has_no_such_columns(tmp_path):
    comparison = comparison_of([make_run(tmp_path, "full_softmax"), make_run(tmp_path, "sampled_softmax")])
    assert not {"smoothed", "coverage"} & set(comparison.columns)


def test_runs_from_before_there_was_a_coverage_are_compared_too(tmp_path):
    folders = [make_run(tmp_path, "full_softmax"), make_run(tmp_path, "sparsemax_output", coverage=0.9)]
    change_result(folders[0], lambda result: [result[part].pop(key) for part in ("valid", "test")
                                              for key in ("coverage", "epsilon_perplexity")])  # fmt: skip
    comparison = comparison_of(folders)
    assert comparison.rows[0].cells["smoothed"] is None and comparison.rows[0].perplexity == pytest.approx(150.0)
    assert "Smoothed perplexity" in report.text_table(survey(folders, "")) and written(folders, tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_finished_run_that_predicts_nothing_has_diverged(tmp_path, value):
    folders = [make_run(tmp_path, "full_softmax"), make_run(tmp_path, "sampled_softmax")]
    change_result(folders[0], lambda result: result["test"].update(perplexity=value))
    comparison = comparison_of(folders)
    assert comparison.rows[-1].note == "diverged at step 2,500" and comparison.reference is None
    written(folders, tmp_path)
    assert "diverged at step 2,500" in (tmp_path / "report.html").read_text()


def test_words_are_banded_as_in_the_best_layer_and_a_run_banded_otherwise_has_no_loss_there(tmp_path):
    folders = [make_run(tmp_path, "full_softmax", seed=seed, perplexity=160.0) for seed in (1, 2)]
    folders += [make_run(tmp_path, "sampled_softmax", seed=seed) for seed in (1, 2)]
    change_result(folders[0], lambda result: result["test"].update(bands=result["test"]["bands"][:2]))
    sampled, full = (losses for _, losses in Bands.of(comparison_of(folders)).rows)
    assert full == [0.0] * 5 and sampled == pytest.approx([math.log(150 / 160)] * 5)


def test_a_layer_whose_memory_was_not_measured_is_on_no_frontier_of_memory(tmp_path):
    folders = [
        make_run(tmp_path / "runs", "full_softmax", perplexity=100.0, peak_bytes=0),
        make_run(tmp_path / "runs", "sampled_softmax"),
    ]
    comparison = written(folders, tmp_path)
    assert [row.label for row in comparison.frontier(comparison.memory)] == ["Sampled softmax"]
    assert "by memory\nsampled softmax." in (tmp_path / "report.html").read_text()
    change_result(folders[1], lambda result: result["memory"].update(peak_bytes=0))
    assert "by memory" not in report.html(report.Report.of(folders, "Study", (), (), tmp_path / "nothing"))


def test_overflowing_validations_do_not_reach_the_figures(tmp_path):
    folder = make_run(tmp_path / "runs", "full_softmax", status="diverged")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    moment = {"step": 800, "tokens": 320_000, "epoch": 0.1, "seconds": 64.0}
    for value in (math.inf, math.nan):
        lines.insert(-1, json.dumps({"kind": "valid", **moment, "nll": value, "perplexity": value, "bands": []}))
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    comparison = written([folder], tmp_path)
    assert len(comparison.runs[0].curve) == 6


@pytest.mark.parametrize("kept", [[], ["full_softmax"], ["sampled_softmax"], ["sampled_softmax", "adaptive_softmax"]])
def test_few_runs_do_not_break_the_page(tmp_path, kept):
    found = report.write([make_run(tmp_path / "runs", layer) for layer in kept], tmp_path, "", results=tmp_path / "no")
    page = (tmp_path / "report.html").read_text()
    assert report.answer(found).replace("'", "&#39;") in page
    assert len(found.rows) == len(kept)
    assert ("* plotly.js v" in page) == bool(kept)
    report.text_table(found)
    if not kept:
        assert "nothing to compare" in page
    if len(kept) == 2:
        assert "No run of full softmax has finished" in page
