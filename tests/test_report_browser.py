"""The report in a real browser: sort, filter, hover, switches, advice; no error, no request, no overflow."""

import re
import shutil

import pytest
from synthetic_runs import make_benchmark, make_run, make_seeds, make_sweep

from experiments import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on the path; apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    folders = [*make_seeds(root / "runs"), *make_sweep(root / "runs")]
    limits = {"epochs": None, "tokens": 4_000_000, "seconds": None}
    folders.append(make_run(root / "runs", "taylor_softmax", corpus="ptb", status="diverged", budget=limits))
    benchmark = make_benchmark(root / "vocabulary" / "results.csv")
    (root / "report.html").write_text(report.html(
        report.Report.of(folders, "Output layers compared", (), [benchmark], root / "nothing")
    ))  # fmt: skip
    return (root / "report.html").as_uri()


@pytest.fixture
def page(browser, address):
    """The page, opened; whatever it complains about or asks the network for fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    page = context.new_page()
    page.set_default_timeout(20_000)
    wrong = []
    page.on("console", lambda message: wrong.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on(
        "request", lambda request: wrong.append(request.url) if not request.url.startswith(("file:", "data:")) else 0
    )
    page.goto(address)
    yield page
    context.close()
    assert not wrong, wrong


def column(page, heading, table="article:not(.away) table.layers"):
    """The texts of a column, of the rows that are shown, from top to bottom."""
    return page.evaluate(
        """([table, heading]) => {
          const found = document.querySelector(table);
          const place = [...found.tHead.rows[0].cells].findIndex((cell) => cell.innerText.startsWith(heading));
          return [...found.tBodies[0].rows].filter((row) => !row.hidden)
            .map((row) => row.cells[place].innerText.split("\\n")[0].trim());
        }""",
        [table, heading],
    )


def test_headings_sort_by_number_in_both_directions_and_say_so(page):
    header = page.locator("article:not(.away) table.layers th", has_text="Tokens/s")
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    speeds = column(page, "Tokens/s")
    assert speeds == ["5,000", "17,000", "19,000", "20,000", "24,000", "–"]  # the diverged layer stays last
    header.locator("button").press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert column(page, "Tokens/s") == [*speeds[-2::-1], "–"]
    assert page.locator("article:not(.away) th[aria-sort]").count() == 1


def test_a_place_that_is_none_leaves_the_page_whole(page, address):
    page.goto(address + "#50%")
    page.reload()
    page.get_by_role("button", name="Test perplexity").first.click()
    assert column(page, "Test perplexity")


def test_filters_combine_and_count(page):
    form = page.locator("article:not(.away) .filter")
    form.locator("[name=exact]").check()
    assert "Sampled softmax" not in column(page, "Output layer")
    form.locator("[name=verdict]").select_option("worse")
    form.locator("[name=text]").fill("class")
    assert column(page, "Output layer") == ["Class softmax"]
    assert form.locator("output").inner_text() == "1 of 6 layers"
    form.locator("[name=verdict]").select_option("better")
    assert column(page, "Output layer") == [] and form.locator("output").inner_text() == "0 of 6 layers"
    form.locator("[name=text]").fill("")
    form.locator("[name=verdict]").select_option("")
    form.locator("[name=exact]").uncheck()
    form.locator("[name=frontier]").check()
    assert set(column(page, "Output layer")) == {
        "Hierarchical softmax", "Class softmax", "Sampled softmax", "Full softmax"
    }  # fmt: skip


def test_hover_shows_the_run(page):
    plot = page.locator("article:not(.away) .plot").first
    plot.scroll_into_view_if_needed()
    plot.locator(".scatterlayer .trace .point").first.hover(force=True)
    text = plot.locator(".hovertext").text_content()
    assert "softmax" in text and "ptb/" in text and "tokens/s" in text


def test_switches_choose_axes_and_settings(page):
    plot = page.locator("article:not(.away) .plot").first
    plot.scroll_into_view_if_needed()
    assert "training time" in plot.locator(".xtitle").text_content()
    page.locator("article:not(.away) label", has_text="against memory").click()
    assert "memory" in plot.locator(".xtitle").text_content()
    page.locator(".settings label", has_text="enwiki2014").click()
    assert page.locator("article:visible").count() == 1
    assert set(column(page, "Verdict")) == {"better", "reference"}
    page.locator(".answers a", has_text="wikitext2").click()  # the browser tells the page of it a moment later
    page.locator("article:visible h2", has_text=re.compile(r"^wikitext2")).wait_for()
    assert page.locator("article:visible").count() == 1
    page.locator("#glance a", has_text="ptb").click()
    page.locator("article:visible h2", has_text=re.compile(r"^ptb")).wait_for()
    assert page.locator("article:visible").count() == 1


def test_the_key_hides_a_layer_everywhere(page):
    plot = page.locator("article:not(.away) .plot").first
    plot.scroll_into_view_if_needed()
    plot.locator(".scatterlayer .trace").first.wait_for()
    before = plot.locator(".scatterlayer .trace").count()
    page.locator("article:not(.away) .key button", has_text="Class softmax").first.click()
    assert plot.locator(".scatterlayer .trace").count() == before - 1
    assert page.locator(".key button[aria-pressed=false]", has_text="Class softmax").count() > 1
    assert page.locator("#vocabularies .key button[aria-pressed=false]").count() == 0  # a section of its own


def test_a_number_leads_to_its_run(page):
    page.locator("article:not(.away) table.layers a").first.click()
    row = page.locator("tr:target")
    row.wait_for()
    assert "A processor" in row.inner_text() and "5d221a0000" in row.inner_text()


def ask(page, vocab, hidden, *, exact=False, tolerance="0.02"):
    form = page.locator("form.advice")
    form.locator("[name=vocab]").fill(str(vocab))
    form.locator("[name=hidden]").fill(str(hidden))
    form.locator("[name=exact]").set_checked(exact)
    form.locator("[name=tolerance]").select_option(tolerance)
    return page.locator("#recommended").inner_text(), page.locator("#recommendation").inner_text()


def advised(page, heading):
    """A column of the table under the recommendation, by layer."""
    table = "#recommendation table"
    return dict(zip(column(page, "Output layer", table), column(page, heading, table), strict=True))


def test_advice_follows_the_tables(page):
    # 10,000 words: ptb is there. Class softmax loses 1.5 %, and takes a tenth of the time; the tree loses 16 %.
    short, long = ask(page, 10_000, 200)
    assert short.startswith("Class softmax:") and "(worse)" in short
    # full softmax took 1 s at D 256 and 1,024 tokens; here D 200 and 400 tokens: 1000 * 200 / 256 * 400 / 1024 ms
    assert "full softmax's 305\u00a0ms" in short and "takes 30.5\u00a0ms" in short
    assert "ptb, 4\u00a0M tokens each" in long and "3 seeds" in long
    assert ask(page, 10_000, 200, tolerance="0")[0].startswith("Full softmax:")
    assert ask(page, 10_000, 200, tolerance="0.1")[0].startswith("Class softmax:")
    # 140,000 words: equal time on enwiki2014, where adaptive softmax is 18 % below.
    short, long = ask(page, 140_000, 512)
    assert short.startswith("Adaptive softmax:") and "equal training time" in short and ": better" in short
    # A million words, exact: the same evidence, with a word about how far away it is; sampling does not fit.
    short, long = ask(page, 1_000_000, 256, exact=True)
    assert short.startswith("Adaptive softmax:") and "differs by a factor of 7.14" in long
    fits = advised(page, "Fits")
    assert fits["Sampled softmax"] == "no" and fits["Hierarchical softmax"] == "yes"


def test_advice_where_the_nearest_vocabulary_saw_no_layer_that_could_fit(browser, tmp_path):
    limits = {"epochs": None, "tokens": None, "seconds": 1200}
    runs = [("full_softmax", 150.0), ("sampled_softmax", 100.0), ("adaptive_softmax", 120.0)]
    folders = [
        make_run(tmp_path, layer, seed=seed, **text, perplexity=perplexity + seed, budget=limits)
        for text, layers in (
            ({"corpus": "enwiki2014", "vocabulary": 140_000}, runs[:2]),
            ({"corpus": "ptb", "vocabulary": 10_000}, runs),
        )
        for layer, perplexity in layers
        for seed in (1, 2, 3)
    ]  # fmt: skip
    written = report.Report.of(folders, "Two texts", (), [], tmp_path / "nothing")
    (tmp_path / "report.html").write_text(report.html(written))
    page = browser.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    short, long = ask(page, 1_000_000, 256)
    assert short.startswith("Sampled softmax:") and "differs by a factor of 7.14" in long and "is nearer" not in long
    short, long = ask(page, 1_000_000, 256, exact=True)
    assert short.startswith("Adaptive softmax:")
    assert "V 140,000, is nearer to yours, but no layer trained on its likelihood" in long
    assert "differs by a factor of 100," in long
    page.close()


def test_advice_in_equal_time_takes_the_fastest_of_those_that_are_level(browser, tmp_path):
    limits = {"epochs": None, "tokens": None, "seconds": 1200}
    folders = [
        make_run(tmp_path, layer, perplexity=perplexity, speed=speed, vocabulary=140_000, budget=limits)
        for layer, perplexity, speed in (
            ("full_softmax", 200.0, 1000.0),
            ("adaptive_softmax", 100.0, 8000.0),
            ("class_softmax", 101.5, 20_000.0),
            ("hierarchical_softmax", 103.0, 30_000.0),
        )
    ]
    written = report.Report.of(folders, "Equal time", (), [], tmp_path / "nothing")
    (tmp_path / "report.html").write_text(report.html(written))
    page = browser.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    short = ask(page, 140_000, 256, tolerance="0.02")[0]
    assert short.startswith("Class softmax:") and "the fastest of the 2 within 2 % of the lowest perplexity" in short
    assert "it trains 20 times as fast" in short
    order = ["Class softmax", "Adaptive softmax", "Hierarchical softmax", "Full softmax"]
    assert column(page, "Output layer", "#recommendation table") == order
    short = ask(page, 140_000, 256, tolerance="0")[0]
    assert short.startswith("Adaptive softmax:") and "it reached the lowest perplexity in equal training time" in short
    assert ask(page, 140_000, 256, tolerance="0.05")[0].startswith("Hierarchical softmax:")
    page.close()


def test_advice_says_how_many_seeds_the_layer_has_and_that_some_were_lost(browser, tmp_path):
    folders = [make_run(tmp_path, "full_softmax", seed=seed, speed=1000.0) for seed in (1, 2, 3)]
    folders += [make_run(tmp_path, "sampled_softmax", seed=seed) for seed in (1, 2)]
    folders.append(make_run(tmp_path, "sampled_softmax", seed=3, status="diverged"))
    written = report.Report.of(folders, "A lost seed", (), [], tmp_path / "nothing")
    (tmp_path / "report.html").write_text(report.html(written))
    page = browser.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    short, long = ask(page, 18_000, 200)
    assert short.startswith("Sampled softmax:") and short.endswith(" But 1 of 3 seeds diverged.")
    assert "this layer's is a mean of 2 seeds." in long
    short, long = ask(page, 18_000, 200, exact=True)
    assert short.startswith("Full softmax:") and "diverged" not in short
    assert "this layer's is a mean of 3 seeds." in long
    page.close()


def test_advice_has_no_times_of_a_layer_that_was_timed_with_other_options_only(browser, tmp_path):
    folders = [
        make_run(tmp_path, "full_softmax", vocabulary=10_000),
        make_run(tmp_path, "sampled_softmax", vocabulary=10_000, output={"samples": 2000}, speed=15_000.0),
        make_run(tmp_path, "class_softmax", vocabulary=10_000, perplexity=400.0),
    ]
    benchmark = make_benchmark(tmp_path / "v" / "results.csv")
    (tmp_path / "report.html").write_text(
        report.html(report.Report.of(folders, "Other options", (), [benchmark], tmp_path / "nothing"))
    )
    page = browser.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    short, long = ask(page, 10_000, 256)
    assert short.startswith("Sampled softmax: ") and "it trains 3 times as fast as full softmax there" in short
    assert "whole training steps in that setting: Sampled softmax." in long
    assert advised(page, "Step") == {
        "Full softmax": "391\u00a0ms", "Sampled softmax": "–", "Class softmax": "39.1\u00a0ms"
    }  # fmt: skip
    page.close()


def test_advice_between_measured_sizes_and_beyond_them(page):
    # Full softmax is linear in V: at 31,623 words 3.16 s for the measured step, at 10 million 1,000 s.
    form = page.locator("form.advice")
    form.locator("[name=tokens]").fill("1024")
    ask(page, 31_623, 256)
    times = advised(page, "Step")
    assert times["Full softmax"] == "3.16\u00a0s" and times["Hierarchical softmax"] == "56.1\u00a0ms"
    _, long = ask(page, 10_000_000, 256)
    assert "extrapolated" in long
    assert advised(page, "Step")["Full softmax"] == "1,000\u00a0s"
    form.locator("[name=vocab]").fill("")
    assert "Please give whole numbers" in page.locator("#recommendation").inner_text()


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window_and_text_stands_out(browser, address, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.goto(address)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ratios = page.evaluate(
        """() => {
          const light = (colour) => {
            const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255)
              .map((part) => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
            return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
          };
          const paper = light(getComputedStyle(document.body).backgroundColor);
          return [".answer", ".soft", ".worse", ".better", "nav a", "figcaption, .caveats li"].map((selector) => {
            const found = document.querySelector(selector);
            if (!found) return 21;
            const ink = light(getComputedStyle(found).color);
            return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
          });
        }"""
    )
    assert min(ratios) >= 4.5, ratios
    context.close()


def test_a_figure_is_drawn_when_it_comes_near_the_window(page):
    figures, drawn = page.locator(".plot:visible"), page.locator(".plot.js-plotly-plot:visible")
    assert drawn.count() < figures.count()
    for place in range(figures.count()):
        figures.nth(place).scroll_into_view_if_needed()
        figures.nth(place).locator(".main-svg").first.wait_for()
    assert drawn.count() == figures.count()


def test_on_paper_every_setting_is_there(page):
    page.emulate_media(media="print")
    assert page.locator("article:visible").count() == 4
    assert not page.locator("nav").is_visible() and not page.locator(".filter").first.is_visible()
