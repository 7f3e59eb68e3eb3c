"""The gallery builds, needs nothing but itself, and shows what the functions say."""

import html.parser
import re
import sys

import matplotlib.figure
import pytest
from pages import Page

from experiments import gallery, pictures

PLATES = [plate for section in gallery.SECTIONS for plate in section.plates]


@pytest.fixture(scope="module")
def page():
    return gallery.html()


def texts(svg: str) -> list[str]:
    """What is written in a picture."""
    found = []
    parser = html.parser.HTMLParser()
    parser.handle_data = lambda data: found.append(data.strip())
    parser.feed(svg)
    return [text for text in found if text]


def test_the_page_needs_nothing_but_itself(page):
    parsed = Page(page)
    assert all(address.startswith(("#", "data:")) for address in parsed.addresses)
    assert "default-src 'none'" in page
    assert "://" not in page and "@import" not in page and "<script" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_the_page_can_be_read_by_a_machine(page):
    parsed = Page(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert set(parsed.references) <= set(parsed.ids)
    assert {address[1:] for address in parsed.addresses if address.startswith("#")} <= set(parsed.ids)
    assert page.count("<svg") == page.count('role="img"') == len(PLATES)
    assert "<html lang=" in page and 'name="viewport"' in page


def test_colours_follow_the_readers_setting(page):
    style, body = page.split("</style>", 1)
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    used = set(re.findall(r"var\(--([\w-]+)\)", body))
    assert used == set(pictures.COLOURS)
    for name in used:
        assert f"--{name}:" in light and f"--{name}:" in dark
    assert not re.search(r"#0\wfe0\w", body)
    assert set(re.findall(r"#[0-9a-f]{6}\b", body)) <= {"#ffffff"}  # on the mixed colours, which are an image


def test_every_picture_is_on_the_page():
    public = {name for name, value in vars(pictures).items() if getattr(value, "__module__", "") == pictures.__name__}
    assert {plate.draw.__name__ for plate in PLATES} == {name for name in public if not name.startswith("_")}
    assert all(plate.caption and plate.label for plate in PLATES)


def test_the_same_code_draws_the_same_page(page):
    assert gallery.html() == page


def test_pictures_show_what_the_functions_say():
    shares = texts(gallery.svg(pictures.shares))
    assert shares.count("0.757") == 2  # not moved by the shift
    assert {"0.102", "0.444", "0.995", "no answer:", "a score is −0.25"} <= set(shares)
    temperatures = texts(gallery.svg(pictures.temperatures))
    assert temperatures.count("0.25") == 4
    assert {"argmin", "all equal", "argmax"} <= set(temperatures)
    sparse = texts(gallery.svg(pictures.sparse))
    assert (sparse.count("1"), sparse.count("3")) == (6, 2)  # of seven places in the planes of two sparse maps


def test_the_command_writes_the_page(tmp_path, monkeypatch, capsys, page):
    target = tmp_path / "some" / "where.html"
    monkeypatch.setattr(sys, "argv", ["gallery", "--output", str(target)])
    gallery.main()
    assert capsys.readouterr().out.strip() == str(target)
    assert target.read_text(encoding="utf-8") == page


def test_pictures_are_drawn_without_a_display():
    colours = dict.fromkeys(pictures.COLOURS, "#000000")
    assert all(isinstance(plate.draw(colours), matplotlib.figure.Figure) for plate in PLATES)
    assert "matplotlib.pyplot" not in sys.modules
