"""The README's results follow the runs that ship."""

import re

import pytest
from synthetic_runs import GROWTH, make_benchmark, make_run, make_seeds

from experiments import showcase, wording
from experiments.scaling import Scaling


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n\n{showcase.BEGIN}old\n{showcase.END}\nafter\n")
    return path


def test_without_runs_it_says_so(readme, tmp_path):
    assert showcase.write(readme, tmp_path / "results") == showcase.NOTHING
    assert readme.read_text() == f"# Title\n\n{showcase.BEGIN}{showcase.NOTHING}{showcase.END}\nafter\n"


def test_tables_figures_and_report_come_from_the_runs(readme, tmp_path):
    results = tmp_path / "results"
    folders = make_seeds(results / "runs")
    for folder in folders[15:]:
        (folder / "config.yaml").unlink()  # two of three texts are enough
    make_run(results / "runs", "taylor_softmax", corpus="ptb", status="diverged",
             budget={"epochs": None, "tokens": 4_000_000, "seconds": None})  # fmt: skip
    make_benchmark(results / "benchmark" / "vocabulary" / "results.csv")
    text = showcase.write(readme, results)
    assert showcase.write(readme, results) == text and readme.read_text().endswith(f"{showcase.END}\nafter\n")
    assert re.search(r"\| full softmax \| 127\.\d \(\d+\.\d to \d+\.\d\) \|  \| reference \| 1\.0× \|", text), text
    assert re.search(r"\| class softmax .*\| \+1\.5\xa0% .*\| worse \| 4\.0× \|", text)
    assert "| taylor softmax (diverged at step 750) |" in text and "| unigram frequencies | 620.0 |" in text
    figures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(figures) == 2 and all((tmp_path / figure).read_bytes().startswith(b"<?xml") for figure in figures)
    assert "1,024 tokens of width 256, A processor, fp32, 1 thread, medians of 3 rounds." in text
    times = {line[0]: line[1:] for line in re.findall(r"\| (.*?) \| (\S*×) \| .* \| (\S*×) \| (\d\.\d\d) \|\n", text)}
    assert times["full softmax"] == ("1.0×", "1.0×", f"{GROWTH['full_softmax'][1]:.2f}")
    for name, (seconds, power) in GROWTH.items():
        (label,) = (label for label in times if label.replace(" ", "_").startswith(name.partition("(")[0]))
        expected = [
            GROWTH["full_softmax"][0] / seconds * 10 ** (k * (GROWTH["full_softmax"][1] - power)) for k in (-1, 2)
        ]
        assert times[label] == (*map(wording.times, expected), f"{power:.2f}"), label
    assert (results / "report" / "report.html").exists() and (results / "report" / "layers.csv").exists()


def test_how_much_faster_is_a_ratio_within_the_rounds_of_a_race(tmp_path):
    path = make_benchmark(tmp_path / "v" / "results.csv")
    assert path.read_text().count(",0.05,0.05,") == 1  # the tree at 10,000 words: seconds, and over full softmax
    path.write_text(path.read_text().replace(",0.05,0.05,", ",0.05,0.04,"))
    text = showcase.growth(Scaling.read(path), "figure.svg")
    assert re.search(r"\| hierarchical softmax \| \S+ \| 25× \|", text), text


def test_a_readme_without_the_marks_is_left_alone(readme, tmp_path):
    readme.write_text("# Title\n")
    with pytest.raises(ValueError, match="put them back"):
        showcase.write(readme, tmp_path / "results")
    assert readme.read_text() == "# Title\n"
