"""Which runs are compared: those of one text, backbone and budget, each layer and seed once."""

import json

import pytest
from synthetic_runs import make_run, make_seeds

from experiments.comparison import survey
from experiments.setting import gather


def test_texts_and_budgets_are_compared_each_for_itself_and_never_averaged(tmp_path):
    folders = make_seeds(tmp_path, (1,))
    folders += [
        make_run(tmp_path, layer, corpus="ptb", vocabulary=10_000, tokens=8_000_000, perplexity=90.0, digits="eeee")
        for layer in ("full_softmax", "sampled_softmax")
    ]
    found = survey(folders, "")
    assert [str(one.setting).replace("\u00a0", " ") for one in found.comparisons] == [
        "ptb, 4 M tokens each", "ptb, 8 M tokens each", "wikitext2, 4 M tokens each", "enwiki2014, 20 min each"
    ]  # fmt: skip
    assert not found.left_out
    assert [len(one.rows) for one in found.comparisons] == [5, 2, 5, 5]
    assert found.comparisons[1].rows[0].cells["test"].mean == pytest.approx(90.0)
    for comparison in found.comparisons:  # a layer looks the same everywhere
        assert {row.label: row.style for row in comparison.rows}.items() <= {
            row.label: row.style for row in found.rows
        }.items()


def test_two_texts_of_one_name_are_two_settings(tmp_path):
    for study, vocabulary in (("excess", 2000), ("noise", 3000)):
        names = {"output": "", "model": "lstm", "data": "zipf", "study": study}
        for layer in ("full_softmax", "sampled_softmax", "class_softmax")[: 3 if study == "noise" else 2]:
            make_run(
                tmp_path, layer, corpus="zipf", digits=study, vocabulary=vocabulary, name=names | {"output": layer}
            )
    make_run(tmp_path, "full_softmax", corpus="zipf", digits="alone", vocabulary=4000)
    found = survey(tmp_path.glob("*/*"), "")
    assert [(one.setting.mark, len(one.rows)) for one in found.comparisons] == [("excess", 2), ("noise", 3)]
    assert len({one.setting.slug for one in found.comparisons}) == 2
    assert found.left_out == [
        ("zipf/full_softmax-lstm-seed1-alone", "another corpus: its vocabulary is 4000, here 3000")
    ]


def test_a_run_is_not_averaged_with_one_under_other_settings(tmp_path):
    make_run(tmp_path, "full_softmax", perplexity=100.0)
    make_run(tmp_path, "full_softmax", perplexity=200.0, digits="ffff", optim={"learning_rate": 0.2})
    found = survey(tmp_path.glob("*/*"), "")
    assert found.comparisons[0].rows[0].cells["test"].mean == pytest.approx(100.0)
    assert "optim.learning_rate" in found.left_out[0][1]


RATES = {"slow": {"learning_rate": 0.05}, "fast": {"learning_rate": 0.2}}


def test_the_seeds_of_a_layer_are_of_one_configuration_the_one_with_the_most(tmp_path):
    make_run(tmp_path, "full_softmax", perplexity=100.0)
    for seed, digits in ((1, "a"), (2, "c")):
        make_run(tmp_path, "sampled_softmax", seed=seed, perplexity=200.0, digits=digits, optim=RATES["slow"])
    for seed, digits in ((1, "b"), (2, "b"), (3, "d")):
        quiet = {"log_every": seed, "device": f"cuda:{seed}"}
        make_run(tmp_path, "sampled_softmax", seed=seed, digits=digits, optim=RATES["fast"] | {"clip": None}, **quiet)
    found = survey(tmp_path.glob("*/*"), "")
    sampled = found.comparisons[0].rows[1]
    assert [(run.name[-1], run.seed) for run in sampled.runs] == [("b", 1), ("b", 2), ("d", 3)]
    assert sampled.cells["test"].mean == pytest.approx(150.0)
    reason = "same layer as sotu/sampled_softmax-lstm-seed1-b under other settings: they differ in optim.learning_rate"
    assert found.left_out == [(f"sotu/sampled_softmax-lstm-seed{seed}-{digits}", reason)
                              for seed, digits in ((1, "a"), (2, "c"))]  # fmt: skip


def test_the_configuration_that_a_study_names_goes_before_one_with_more_seeds(tmp_path):
    for seed in (1, 2, 3):
        make_run(tmp_path, "sampled_softmax", seed=seed, digits="a", perplexity=200.0, optim=RATES["slow"])
    named = [make_run(tmp_path, "sampled_softmax", seed=seed, digits="b", optim=RATES["fast"]) for seed in (1, 2)]
    ((_, runs),), left_out = gather(tmp_path.glob("*/*"), first=[f"sotu/{named[1].name}"])
    assert sorted(run.name for run in runs) == [f"sotu/{folder.name}" for folder in named]
    assert [name[-1] for name, _ in left_out] == ["a", "a", "a"]


def test_real_text_comes_before_generated_text(tmp_path):
    folders = []
    for corpus, vocabulary, source in (("zipf", 2000, 4.0), ("ptb", 10_000, None)):
        for layer in ("full_softmax", "sampled_softmax"):
            folders.append(make_run(tmp_path, layer, corpus=corpus, vocabulary=vocabulary))
            result = json.loads((folders[-1] / "result.json").read_text())
            result["test"]["source_nll"] = source
            (folders[-1] / "result.json").write_text(json.dumps(result))
    assert [one.setting.data for one in survey(folders, "").comparisons] == ["ptb", "zipf"]


def test_runs_from_before_a_layer_had_backends_are_of_the_same_layer(tmp_path):
    folders = [
        make_run(tmp_path, "full_softmax", seed=seed, output=output, digits=str(place))
        for place, (seed, output) in enumerate([(1, {}), (2, {"backend": "auto"}), (2, {"backend": "eager"})])
    ]
    rows = survey(folders, "").comparisons[0].rows
    assert {row.label: [run.seed for run in row.runs] for row in rows} == {
        "Full softmax (backend=auto)": [1, 2], "Full softmax (backend=eager)": [2]
    }  # fmt: skip


def test_an_option_that_is_younger_than_a_run_makes_no_other_layer_of_it_where_it_is_not_set(tmp_path):
    folders = [
        make_run(tmp_path, "full_softmax", seed=1),
        make_run(tmp_path, "full_softmax", seed=2, output={"softcap": None}),
    ]
    folders += [
        make_run(tmp_path, "full_softmax", seed=seed, output={"softcap": 30.0}, digits="cafe") for seed in (1, 2)
    ]
    (comparison,) = survey(folders, "").comparisons
    assert sorted((row.label, len(row.runs)) for row in comparison.rows) == [
        ("Full softmax", 2), ("Full softmax (softcap=30.0)", 2)
    ]  # fmt: skip
