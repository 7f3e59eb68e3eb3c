import csv
import html
import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import plotly.graph_objects
import pytest
from synthetic_runs import make_run, quick_study

from experiments import report
from experiments.breakdown import Bands
from experiments.comparison import Stop, perplexity_at, survey
from experiments.drawing import log_ticks


def comparison_of(folders):
    """The one setting that the folders have."""
    (comparison,) = survey(folders, "Study").comparisons
    return comparison


def written(folders, output, **options):
    """Write a report with nothing shipped beside it, and return its one comparison."""
    found = report.write(folders, output, "Study", **{"results": output / "nothing"} | options)
    return found.comparisons[0] if len(found.comparisons) == 1 else found


def names(comparison):
    return [row.label for row in comparison.rows]


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


# -- the numbers ----------------------------------------------------------------------------------------------------


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
        "speed); adaptive softmax needs the least memory (890 MB at its peak)."
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


def test_perplexity_between_two_validations_is_their_geometric_mean():
    curve = [{"seconds": 10.0, "perplexity": 400.0}, {"seconds": 30.0, "perplexity": 100.0}]
    assert perplexity_at(curve, Stop("seconds", 20.0)) == pytest.approx(200.0)
    assert perplexity_at(curve, Stop("seconds", 30.0)) == pytest.approx(100.0)
    assert perplexity_at(curve, Stop("seconds", 31.0)) is None
    assert perplexity_at(curve[:1], Stop("seconds", 10.0)) == 400.0


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


# -- folders that are not as they should be -------------------------------------------------------------------------


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


def change_result(folder, change):
    result = json.loads((folder / "result.json").read_text())
    change(result)
    (folder / "result.json").write_text(json.dumps(result))


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


# -- the page -------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Collects what the tests ask about, and fails on tags that do not match."""

    VOID = ("meta", "link", "br", "circle", "rect", "path", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.references, self.addresses, self.tables, self.cells = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [attributes[key] for key in ("id",) if key in attributes]
        self.references += [attributes[key] for key in ("aria-labelledby",) if key in attributes]
        self.addresses += [attributes[key] for key in ("src", "href", "action") if key in attributes]
        if tag == "table":
            self.tables.append([])
        if self.tables and tag in ("caption", "th"):
            self.tables[-1].append((tag, attributes.get("scope")))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    folders = quick_study(root / "runs")
    folders += [make_run(root / "runs", "full_softmax", seed=2), make_run(root / "runs", "a_softmax", status="running")]
    folders += [make_run(root / "runs", f"layer{index}_softmax") for index in range(8)]
    report.write(folders, root, "Study </title><script>alert(1)</script>", results=root / "nothing")
    return (root / "report.html").read_text()


def test_page_needs_nothing_but_itself(page):
    parsed = Page(page)
    assert {address for address in parsed.addresses if not address.startswith("#")} == {"data:,"}
    targets = {address[1:] for address in parsed.addresses if address.startswith("#")}
    assert targets <= set(parsed.ids), targets - set(parsed.ids)
    assert "default-src 'none'" in page
    style = page.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert page.count("* plotly.js v") == 1


def test_page_can_be_read_by_a_machine(page):
    parsed = Page(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert set(parsed.references) <= set(parsed.ids)
    assert len(parsed.tables) == 4  # layers, bands, runs, what is left out
    for table in parsed.tables:
        assert table[0][0] == "caption"
        assert {scope for tag, scope in table if tag == "th"} == {"col", "row"}
    assert "<html lang=" in page and 'name="viewport"' in page


def test_page_escapes_what_it_is_given(page, tmp_path):
    assert "<script>alert" not in page
    folder = make_run(tmp_path / "runs", "full_softmax", output={"note": "</script><b>"})
    make_run(tmp_path / "runs", "full_softmax", digits="f", output={"note": "plain"})
    written((tmp_path / "runs").glob("*/*"), tmp_path)
    assert "</script><b>" not in (tmp_path / "report.html").read_text()
    assert folder.exists()


def test_figures_are_valid_and_their_colours_defined(page):
    figures = re.findall(r'<script type="application/json" id="([\w-]+)-data">(.*?)</script>', page, re.DOTALL)
    assert [name for name, _ in figures if name != "advice"] == [
        "frontier-seconds", "frontier-memory", "curves-seconds", "curves-tokens", "bands"
    ]  # fmt: skip
    figures = [figure for figure in figures if figure[0] != "advice"]
    style = page.split("<style>")[1].split("</style>")[0]
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    for _, text in figures:
        for name in set(re.findall(r'"@([\w-]+)"', text)) | set(re.findall(r"var\(--(layer-\d)\)", page)):
            assert f"--{name}:" in light and f"--{name}:" in dark, name
        plotly.graph_objects.Figure(json.loads(re.sub(r'"@[\w-]+"', '"#000000"', text)))


def test_every_layer_is_told_apart_by_more_than_colour(tmp_path):
    folders = [make_run(tmp_path, f"layer{index}_softmax") for index in range(24)]
    rows = comparison_of(folders).rows
    assert len({row.style for row in rows}) == 24
    assert len({(row.style.marker, row.style.dash) for row in rows[:6]}) == 6


def test_command_line_prints_the_table_and_the_page(tmp_path, capsys, monkeypatch):
    folders = quick_study(tmp_path / "runs")
    shutil.rmtree(folders[-1] / "checkpoints")
    monkeypatch.setattr(sys, "argv", ["report", *map(str, folders), str(tmp_path), "--output", str(tmp_path / "out")])
    report.main()
    printed = capsys.readouterr().out
    assert "Hierarchical softmax" in printed and "left out: " in printed and "out/report.html" in printed
    assert (tmp_path / "out" / "results.csv").exists()
