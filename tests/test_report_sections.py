"""The report's parts: verdicts, frontier, growth with V, the evidence for advice, what ships."""

import csv
import json
import math
import re
from pathlib import Path

import pytest
from synthetic_runs import GROWTH, make_benchmark, make_run, make_seeds, make_sweep

from experiments import report, tables
from experiments.advice import advice, is_exact, own_options
from experiments.comparison import survey
from experiments.reading import read
from experiments.scaling import Growth, Scaling
from experiments.style import STYLES


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return make_seeds(tmp_path_factory.mktemp("seeds"))


def page(folders, output, studies=(), benchmarks=(), results=None):
    """The page alone, without tables and figures for documents."""
    return report.html(report.Report.of(folders, "Study", studies, benchmarks, results or output / "nothing"))


# -- verdicts -------------------------------------------------------------------------------------------------------


def test_verdicts_are_of_pairs_of_seeds(seeds):
    found = {one.setting.data: one for one in survey(seeds, "").comparisons}
    verdicts = {row.label: row.verdict for row in found["ptb"].rows}
    assert verdicts == {
        "Full softmax": "", "Sampled softmax": "worse", "Adaptive softmax": "worse", "Class softmax": "worse",
        "Hierarchical softmax": "worse",
    }  # fmt: skip
    same = next(row for row in found["wikitext2"].rows if row.label == "Adaptive softmax")
    assert same.verdict == "not distinguishable" and abs(same.cells["difference"].mean) < 0.002
    assert {row.verdict for row in found["enwiki2014"].rows} == {"better", ""}


def test_the_answer_says_how_sure_it_is(seeds):
    told = report.answer(survey(seeds, "")).replace("\u00a0", " ").split("\n")
    assert "not distinguishable from" not in told[0] and "better than every other layer" in told[0]
    assert "worse by" in told[0] and "not distinguishable" in told[1]
    assert "against full softmax: better" in told[2] and told[2].startswith("enwiki2014, 20 min each: Adaptive")


def test_an_order_that_differs_at_equal_text_is_explained(seeds):
    comparison = survey(seeds, "").comparisons[-1]
    (note,) = [note for note in report.caveats(comparison) if "At equal time" in note]
    assert "read 3.8× as much text as full softmax" in note


def test_layers_csv_has_intervals_verdicts_and_corrected_p_values(seeds):
    lines = list(csv.DictReader(tables.layers_csv(survey(seeds, "")).splitlines()))
    assert len(lines) == 15
    for line in lines:
        assert float(line["test_low"]) < float(line["test"]) < float(line["test_high"])
        if line["layer"] != "Full softmax":
            assert float(line["p_corrected"]) >= float(line["p"])
            assert (line["verdict"] == "not distinguishable") == (float(line["p_corrected"]) >= 0.05)


def test_frontier_is_what_nothing_beats_in_both(seeds):
    comparison = survey(seeds, "").comparisons[0]
    on = comparison.frontier(comparison.seconds)
    assert [row.label for row in on] == ["Hierarchical softmax", "Class softmax", "Sampled softmax", "Full softmax"]
    for row in comparison.finished:
        beaten = any(other.perplexity < row.perplexity and comparison.seconds(other) < comparison.seconds(row)
                     for other in comparison.finished)  # fmt: skip
        assert beaten == (row not in on)


# -- growth with V --------------------------------------------------------------------------------------------------


def test_exponents_are_recovered(tmp_path):
    scaling = Scaling.read(make_benchmark(tmp_path / "vocabulary" / "results.csv"))
    assert scaling.vocabs == [1000, 10_000, 100_000, 1_000_000] and (scaling.tokens, scaling.hidden) == (1024, 256)
    assert {growth.contestant: round(growth.power("seconds").exponent, 6) for growth in scaling.growths} == {
        name: power for name, (_, power) in GROWTH.items()
    }
    full = next(growth for growth in scaling.growths if growth.name == "full_softmax")
    assert full.power("memory").exponent == pytest.approx(1) and full.points[0].memory == 1000 * (4 * 257 + 1028 + 100)
    assert scaling.conditions["processor"] == "A processor" and scaling.conditions["clock"] == "CPU time"


def test_more_labels_than_styles_share_them_but_not_within_a_figure(tmp_path):
    """Every style is taken by a run's label; the lines of growth still find ones that no other line has."""
    folders = [
        make_run(tmp_path, "sampled_softmax", output={"samples": samples}, digits=f"samples{samples}")
        for samples in range(1, len(STYLES) + 2)
    ]
    benchmark = make_benchmark(tmp_path / "vocabulary" / "results.csv")
    shown = report.Report.of(folders, "", (), [benchmark], tmp_path / "nothing")
    styles = [shown.looks[growth.label] for growth in shown.scaling.growths]
    assert len(set(styles)) == len(styles) == len(GROWTH)
    assert set(STYLES) <= {row.style for row in shown.survey.rows}


def test_options_of_a_contestant_are_read(tmp_path):
    path = make_benchmark(tmp_path / "v" / "results.csv", (1000, 10_000))
    path.write_text(path.read_text().replace("\nsampled_softmax,", '\n"sampled_softmax(noise=uniform, samples=8)",'))
    growth = next(growth for growth in Scaling.read(path).growths if growth.name == "sampled_softmax")
    assert growth.options == {"noise": "uniform", "samples": "8"}
    assert growth.label == "Sampled softmax (noise=uniform, samples=8)"
    tails = Growth("adaptive_softmax(cutoffs=[0.05, 0.5], bias=false)", ())
    assert tails.options == {"cutoffs": "[0.05, 0.5]", "bias": "false"}
    assert tails.label == "Adaptive softmax (cutoffs=[0.05, 0.5], bias=false)"


@pytest.mark.parametrize("fault", [lambda text: text[: len(text) // 2 + 3], lambda text: "a,b\n1,2\n",
                                   lambda text: text.replace("1.0,", "-1.0,")])  # fmt: skip
def test_a_damaged_benchmark_is_left_out_by_name(tmp_path, seeds, fault):
    path = make_benchmark(tmp_path / "broken" / "results.csv")
    path.write_text(fault(path.read_text()))
    text = page(seeds[:5], tmp_path, benchmarks=[path])
    assert "broken/results.csv" in text and "no table of a benchmark" in text


# -- advice ---------------------------------------------------------------------------------------------------------


def test_what_a_layer_is_trained_on_is_read_off_its_source():
    import inspect

    from hydra.utils import get_class

    from experiments.catalogue import trained_on

    names = [path.stem for path in (Path(report.__file__).parents[1] / "lvsoftmax/layers").glob("[a-z]*.py")]
    for name in names:
        layer = get_class(f"lvsoftmax.layers.{name}.{''.join(map(str.capitalize, name.split('_')))}")
        assert inspect.isclass(layer) and is_exact(name) == (trained_on(layer) == "its likelihood"), name
    assert is_exact("of_somebody_else") is None


def test_the_page_promises_no_more_of_exact_layers_than_is_known(tmp_path):
    """Nothing tells which of them pass over the vocabulary for a probability: full softmax does."""
    text = page([make_run(tmp_path, layer) for layer in ("full_softmax", "sampled_softmax")], tmp_path / "out")
    assert "I need exact probabilities: a layer trained on its likelihood, no surrogate" in text
    assert "pass over the vocabulary" not in text


def test_evidence_is_what_the_tables_say(seeds, tmp_path):
    found = survey(seeds, "")
    scaling = Scaling.read(make_benchmark(tmp_path / "v" / "results.csv"))
    evidence = advice([("#here", one) for one in found.comparisons], scaling)
    assert json.loads(json.dumps(evidence)) == evidence
    ptb = evidence["settings"][0]
    assert (ptb["vocab"], ptb["inTime"], ptb["place"]) == (10_000, False, "#here")
    rows = {row["name"]: row for row in ptb["rows"]}
    assert rows["sampled_softmax"]["above"] == pytest.approx(math.expm1(0.01), abs=0.002)
    assert rows["full_softmax"]["above"] == 0 and not rows["sampled_softmax"]["exact"]
    assert {(row["seeds"], row["note"]) for row in rows.values()} == {(3, "")}
    assert [name for name, row in rows.items() if row["reference"]] == ["full_softmax"]
    assert evidence["settings"][2]["inTime"]
    curve = next(one for one in evidence["scaling"]["layers"] if one["name"] == "hierarchical_softmax")
    assert curve["points"][1][:2] == [10_000, 0.05] and curve["exact"]


def test_evidence_says_of_how_many_seeds_a_layer_is_and_which_were_lost(tmp_path):
    folders = [make_run(tmp_path, layer, seed=seed) for layer in ("full_softmax", "sampled_softmax") for seed in (1, 2)]
    folders.append(make_run(tmp_path, "sampled_softmax", seed=3, status="diverged"))
    rows = advice([("#here", survey(folders, "").comparisons[0])], None)["settings"][0]["rows"]
    assert {row["name"]: (row["seeds"], row["note"]) for row in rows} == {
        "full_softmax": (2, ""), "sampled_softmax": (2, "1 of 3 seeds diverged")
    }  # fmt: skip


def test_times_of_the_evidence_are_ratios_within_the_rounds_of_a_race(tmp_path):
    path = make_benchmark(tmp_path / "v" / "results.csv")
    assert path.read_text().count(",0.05,0.05,") == 1  # the tree at 10,000 words: seconds, and over full softmax
    path.write_text(path.read_text().replace(",0.05,0.05,", ",0.05,0.04,"))
    layers = advice([], Scaling.read(path))["scaling"]["layers"]
    full, tree = (next(one for one in layers if one["name"] == f"{name}_softmax") for name in ("full", "hierarchical"))
    assert tree["points"][1][1] / full["points"][1][1] == pytest.approx(0.04)
    path.write_text(path.read_text().replace(",0.05,0.04,", ",0.05,,"))
    layers = advice([], Scaling.read(path))["scaling"]["layers"]
    assert next(one for one in layers if one["name"] == "hierarchical_softmax")["points"][1][1] == 0.05


def test_generated_text_is_evidence_only_where_there_is_no_other(seeds, tmp_path):
    generated = make_sweep(tmp_path)
    for folder in generated:
        result = json.loads((folder / "result.json").read_text())
        result["test"]["source_nll"] = 4.9
        (folder / "result.json").write_text(json.dumps(result))
    alone, both = (
        advice([(one.setting.data, one) for one in survey(folders, "").comparisons], None)["settings"]
        for folders in (generated, [*generated, *seeds])
    )
    assert [one["place"] for one in alone] == ["zipf"]
    assert [one["place"] for one in both] == ["ptb", "wikitext2", "enwiki2014"]


def test_options_that_a_yaml_has_already_are_none_of_a_runs_own(tmp_path):
    own = {"samples": 64, "noise": "unigram", "backend": "cpp", "sparse": False}
    assert own_options(read(make_run(tmp_path, "sampled_softmax", output=own))) == {"samples": "64"}


# -- studies, and what ships ----------------------------------------------------------------------------------------


def make_study(root, folders, **changes):
    names = ["/".join(folder.parts[-2:]) for folder in folders]
    content = {
        "study": "chen2015", "data": "ptb", "budget": {"tokens": 4_000_000}, "runs": names[:-3],
        "layers": [{"layer": "sampled_softmax output.samples=16", "learning_rate": 0.3, "search": [
            {"learning_rate": 0.1, "valid_nll": 5.1, "seconds": 60.0, "run": names[-3]},
            {"learning_rate": 0.3, "valid_nll": None, "seconds": 61.0, "run": names[-2]}]}],
        "smoke": names[-1:],
    }  # fmt: skip
    path = root / "studies" / "chen2015-ptb" / "study.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content | changes))
    return path


def test_a_run_that_a_study_names_goes_before_a_stranger(tmp_path):
    folders = make_seeds(tmp_path, (1,))[:5]
    stranger = make_run(tmp_path, "full_softmax", corpus="ptb", vocabulary=10_000, digits="0000", perplexity=9.0,
                        budget={"epochs": None, "tokens": 4_000_000, "seconds": None})  # fmt: skip
    path = make_study(tmp_path, folders, runs=["/".join(folder.parts[-2:]) for folder in folders], layers=[], smoke=[])
    found = survey([stranger], "", [path])
    assert [name for name, _ in found.left_out] == ["ptb/full_softmax-lstm-seed1-0000"]


def test_a_study_brings_its_runs_and_the_cost_of_its_search(tmp_path):
    folders = make_seeds(tmp_path, (1,))[:5]
    folders += [make_run(tmp_path, "sampled_softmax", corpus="ptb", digits=f"trial{n}", tokens=800_000) for n in "12"]
    folders.append(make_run(tmp_path, "taylor_softmax", corpus="ptb", digits="smoke", tokens=8000))
    path = make_study(tmp_path, folders)
    found = survey(folders, "", [path])
    assert len(found.comparisons) == 1 and len(found.runs) == 5
    assert [reason.split(" of study")[0] for _, reason in found.left_out] == [
        "a trial in the search for a learning rate"] * 2 + ["a smoke run"]  # fmt: skip
    assert found.smoke == [
        ("ptb/taylor_softmax-lstm-seed1-smoke", "taylor softmax: 20 steps without error, at 5,000 tokens/s")
    ]
    alone = survey([], "", [path])
    assert len(alone.runs) == 5 and not alone.left_out
    text = page([], tmp_path / "out", studies=[path])
    assert (
        "2 min 1 s of training".replace(" ", "\u00a0", 1) in text.replace("1\u00a0s", "1 s")
        or "2\u00a0min 1\u00a0s" in text
    )
    assert "at the edge" in text and "0.3:&nbsp;diverged" in text


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"study": "x"}', '{"study": "x", "layers": [{"layer": 1}], "runs": 3}']
)
def test_a_damaged_record_of_a_study_is_left_out_by_name(tmp_path, seeds, content):
    path = make_study(tmp_path, seeds[:5])
    path.write_text(content)
    found = survey(seeds[:5], "", [path])
    assert found.left_out[0][0] == "chen2015-ptb/study.json" and "no record of a study" in found.left_out[0][1]
    assert len(found.runs) == 5


def test_what_one_seed_cannot_say_is_told_from_what_ships(tmp_path):
    results = tmp_path / "results"
    make_seeds(results / "runs")
    make_sweep(results / "runs")
    make_benchmark(results / "benchmark" / "vocabulary" / "results.csv")
    own = [make_run(tmp_path / "runs", layer) for layer in ("full_softmax", "sampled_softmax")]
    text = page(own, tmp_path / "out", results=results)
    assert "too few seeds for a verdict. <em>These studies ship with the project" in text
    assert "These measurements ship with the project" in text
    assert "these are the results that ship with the" in text
    assert len(re.findall(r'id="shipped-[\w-]+?-caption"', text)) == 4
    more = page([*make_seeds(tmp_path / "more")[:15]], tmp_path / "out", results=results)
    assert "too few seeds" not in more and len(re.findall(r'id="shipped-[\w-]+?-caption"', more)) == 3
    shipped = page(list((results / "runs").glob("*/*")), tmp_path / "again", results=results)
    assert "ship with the" not in shipped.split("<main>")[1].split("</main>")[0]


def test_no_name_stands_for_two_places_and_every_link_leads_to_one(tmp_path, seeds):
    benchmark = make_benchmark(tmp_path / "v" / "results.csv")
    report.write(seeds, tmp_path / "out", "Study", benchmarks=[benchmark], results=tmp_path / "nothing")
    text = re.sub(r"<script.*?</script>", "", (tmp_path / "out" / "report.html").read_text(), flags=re.DOTALL)
    names = re.findall(r'\sid="([^"]+)"', text)
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(names)


def test_without_anything_that_ships_the_page_says_so(tmp_path):
    text = page([make_run(tmp_path, layer) for layer in ("full_softmax", "sampled_softmax")], tmp_path / "out")
    assert "no such study ships yet" in text and "no such measurement ships yet" in text


def test_of_the_benchmarks_that_ship_only_step_times_are_read(tmp_path):
    step_times = make_benchmark(tmp_path / "benchmark" / "vocabulary" / "results.csv")
    promises = tmp_path / "benchmark" / "goals" / "results.csv"
    promises.parent.mkdir()
    promises.write_text("line,text,measured,status\n1a,exact loss,0.5,pass\n")
    assert report.shipped_files(tmp_path)[2] == [step_times]


def test_many_folders_left_out_for_one_reason_are_one_line(tmp_path, seeds):
    damaged = [make_run(tmp_path / "runs", "full_softmax", seed=seed) for seed in range(4)]
    for folder in damaged:
        (folder / "result.json").write_text("{")
    text = page([*seeds, *damaged[:3]], tmp_path / "out")
    assert "folders</summary>" not in text and all(folder.name in text for folder in damaged[:3])
    text = page([*seeds, *damaged], tmp_path / "out")
    assert "<summary>4 folders</summary>" in text and all(folder.name in text for folder in damaged)


# -- size -----------------------------------------------------------------------------------------------------------


def test_two_hundred_runs_make_one_page(tmp_path):
    names = ["full_softmax", *(f"layer{number}_softmax" for number in range(19))]
    folders = [
        make_run(tmp_path, name, seed=seed, perplexity=100.0 + place + seed)
        for place, name in enumerate(names) for seed in range(10)
    ]  # fmt: skip
    benchmark = make_benchmark(tmp_path / "v" / "results.csv")
    report.write(folders, tmp_path / "out", "Study", benchmarks=[benchmark], results=tmp_path / "nothing")
    assert len((tmp_path / "out" / "results.csv").read_text().splitlines()) == 201
