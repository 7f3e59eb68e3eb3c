"""The table of all layers in all settings, in the README and on the page."""

import re

from synthetic_runs import make_run, make_seeds, make_sweep

from experiments import report, showcase
from experiments.comparison import survey
from experiments.glance import Glance

TOKENS = {"epochs": None, "tokens": 4_000_000, "seconds": None}


def judged(root):
    """Three settings with verdicts and one without; a layer that was run in one of them, one that diverged there."""
    folders = [*make_seeds(root), *make_sweep(root)]
    for seed in (1, 2, 3):
        folders.append(make_run(root, "spherical_softmax", corpus="ptb", seed=seed, perplexity=60.0, budget=TOKENS,
                                vocabulary=10_000))  # fmt: skip
        folders.append(make_run(root, "taylor_softmax", corpus="ptb", seed=seed, status="diverged", budget=TOKENS))
    return folders


def test_layers_of_many_settings_come_first_and_the_lowest_mean_among_them(tmp_path):
    glance = Glance.of(survey(judged(tmp_path), "Study").comparisons)
    assert [one.setting.data for one in glance.comparisons] == ["ptb", "wikitext2", "enwiki2014"]
    assert [label for label, _ in glance.rows] == [
        "Full softmax", "Adaptive softmax", "Sampled softmax", "Class softmax", "Hierarchical softmax",
        "Spherical softmax", "Taylor softmax",
    ]  # fmt: skip
    for label, rows in glance.rows:
        assert {row.label for row in rows if row} == {label}
        for row, comparison in zip(rows, glance.comparisons, strict=True):
            assert row is next((own for own in comparison.rows if own.label == label), None)


def test_one_setting_with_verdicts_needs_no_second_table(tmp_path):
    found = survey([folder for folder in judged(tmp_path) if folder.parent.name in ("ptb", "zipf")], "Study")
    assert len(found.comparisons) == 2 and Glance.of(found.comparisons) is None
    assert "**in bold**" not in showcase.section(found, {})


def test_the_readme_marks_what_is_better_and_what_is_worse(tmp_path):
    found = survey(judged(tmp_path), "Study")
    figures = {comparison.setting.slug: f"{comparison.setting.slug}.svg" for comparison in found.comparisons}
    text = showcase.section(found, figures)
    first, _, rest = text.partition("\n\n**ptb, 4")
    assert "| output layer | ptb, 4\xa0M tokens each, 10,000 words | wikitext2" in first
    assert "| full softmax | 127.4, 1.0× | 127.4, 1.0× | 127.4, 1.0× |" in first
    assert re.search(r"\| adaptive softmax \| \*131\.\d\*, 3\.8× \| 127\.\d, 3\.8× \| \*\*104\.\d\*\*, 3\.8× \|", first)
    assert "| spherical softmax | **60.0**, 1.0× |  |  |" in first
    assert "| taylor softmax | 3 of 3 seeds diverged |  |  |" in first
    assert first.count(".svg") == 1 and "(enwiki2014-lstm-1200-seconds.svg)" in first
    folds = re.findall(r"<details>.*?</details>", rest, re.DOTALL)
    assert len(folds) == 4 and rest.count("| output layer |") == sum(fold.count("| output layer |") for fold in folds)
    assert [fold.count(".svg") for fold in folds] == [1, 1, 1, 0]  # the picture that is shown above is not shown twice


def test_a_layer_of_another_machine_is_not_said_to_be_level(tmp_path):
    folders = judged(tmp_path)
    assert "where no speed is said" not in showcase.section(survey(folders, "Study"), {})
    limits = {"epochs": None, "tokens": None, "seconds": 1200.0}
    folders += [
        make_run(tmp_path, "spherical_softmax", corpus="enwiki2014", seed=seed, perplexity=60.0, budget=limits,
                 vocabulary=140_000, processor="Another")
        for seed in (1, 2, 3)
    ]  # fmt: skip
    text = showcase.section(survey(folders, "Study"), {})
    assert "the rest cannot be told apart from it or, where no speed is said, was trained on another machine." in text
    assert "| spherical softmax | **60.0**, 1.0× |  | 60.0 |" in text


def test_the_page_shows_it_before_the_settings_with_links_to_them(tmp_path):
    found = report.Report.of(judged(tmp_path), "Study", (), (), tmp_path / "nothing")
    page = report.html(found)
    table = page.partition('id="glance"')[2].partition("</table>")[0]
    assert page.index('id="glance"') < page.index('class="setting"')
    for slug in re.findall(r'href="#(.*?)"', table):
        assert f'<article class="setting" id="{slug}"' in page
    cells = re.findall(r"<td>(.*?)</td>", table)
    assert len(cells) == 7 * 3
    assert cells[3].startswith("131.") and '<span class="worse">worse</span>, 3.8×' in cells[3]
    assert '<span class="not-distinguishable">not distinguishable</span>, 3.8×' in cells[4]
    assert cells[-3:] == [
        '<span class="note">3 of 3 seeds diverged</span>',
        *2 * ['<span aria-label="not run">–</span>'],
    ]
