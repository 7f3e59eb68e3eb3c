"""The report's page as a machine reads it: alone, whole, escaped, its figures valid."""

import json
import re

import plotly.graph_objects
import pytest
from pages import Page
from synthetic_runs import comparison_of, make_run, quick_study, written

from experiments import report


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
