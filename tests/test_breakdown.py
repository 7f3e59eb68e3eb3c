"""A comparison by frequency band, and by the number of drawn words."""

import pytest
from synthetic_runs import make_run, make_seeds, make_sweep

from experiments.breakdown import Bands, Sweep
from experiments.comparison import survey
from experiments.reading import read


def test_bands_are_relative_to_full_softmax(tmp_path):
    folders = [make_run(tmp_path, "full_softmax"), make_run(tmp_path, "sampled_softmax", tail=0.5)]
    table = Bands.of(survey(folders, "").comparisons[0])
    assert table.relative and table.labels[0] == "1–10" and table.labels[-1] == "10,001–18,000"
    assert sum(table.shares) == pytest.approx(1)
    losses = {row.label: values for row, values in table.rows}
    assert losses["Full softmax"] == [0] * 5
    assert losses["Sampled softmax"] == pytest.approx([0.05, 0.0, 0.05, 0.2, 0.45])
    table = Bands.of(survey(folders[1:], "").comparisons[0])
    assert not table.relative and table.rows[0][1][0] == pytest.approx(2.55)


def test_sweep_has_a_line_for_each_noise(tmp_path):
    (comparison,) = survey(make_sweep(tmp_path), "").comparisons
    lines = {line.label: [(number, round(row.perplexity, 3)) for number, row in line.points]
             for line in Sweep.of(comparison).lines}  # fmt: skip
    assert lines == {
        "Sampled softmax (noise=uniform)": [(16, 220.0), (64, 180.0), (256, 160.0)],
        "Sampled softmax (noise=unigram)": [(16, 180.0), (64, 160.0), (256, 150.0)],
    }


def test_a_share_of_the_vocabulary_is_a_number_of_words(tmp_path):
    run = read(make_run(tmp_path, "sampled_softmax", output={"samples": 0.05}, vocabulary=18_000))
    assert run.samples == 900
    run = read(make_run(tmp_path, "sampled_softmax", output={"samples": 0.05}, vocabulary=18_001, digits="2"))
    assert run.samples == 901  # 900.05, of which layers draw no part
    run = read(make_run(tmp_path, "sampled_softmax", output={"samples": 0.07}, vocabulary=100, digits="3"))
    assert run.samples == 7  # 7.000000000000001 in floating point
    assert read(make_run(tmp_path, "sampled_softmax", output={"samples": 1}, digits="1")).samples == 1
    assert read(make_run(tmp_path, "full_softmax")).samples is None


def test_one_number_is_no_sweep(tmp_path):
    assert all(Sweep.of(comparison) is None for comparison in survey(make_seeds(tmp_path, (1,)), "").comparisons)
