"""One page of pictures about the softmax and its family, for people who would rather look.

``python -m experiments.gallery`` writes ``outputs/gallery.html``: a single file that works offline, in light and dark.
Every picture is drawn from what the functions of ``lvsoftmax.ops`` return.
"""

import argparse
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jinja2
import matplotlib
from markupsafe import Markup

from experiments import pictures
from experiments.report import TEMPLATES


class Plate(NamedTuple):
    """A picture and what is said about it."""

    draw: Callable[[pictures.Colours], pictures.Figure]
    label: str
    """What the picture shows, for those who cannot see it."""
    caption: str


class Section(NamedTuple):
    """A heading, a few plain sentences and pictures."""

    title: str
    text: str
    plates: tuple[Plate, ...]


SECTIONS = (
    Section(
        "From scores to shares",
        "A model gives every word a score. To predict, scores must become shares that add up to one. The softmax "
        "takes exponentials first and divides them by their sum. Only differences between scores count: adding ten "
        "to all of them changes nothing, stretching them sharpens the shares, and a score may be negative.",
        (
            Plate(
                pictures.shares,
                "Bars: four rows of scores, and their shares by softmax, argmax and division by the sum.",
                "The same scores, moved, stretched and partly negative. Argmax forgets all but the winner. Dividing by "
                "the sum forgets the stretching, notices the moving, and has no answer to a negative score.",
            ),
        ),
    ),
    Section(
        "Temperature, from zero to infinity and beyond",
        "Dividing the scores by a temperature T before the softmax makes it bold or timid. Towards zero the largest "
        "score takes all, at infinity all are equal, and negative temperatures prefer the small ones. On the scale of "
        "1 / T this is one way from argmin to argmax.",
        (
            Plate(
                pictures.temperatures,
                "Bars at seven temperatures from minus zero over infinity to zero, above areas for all in between.",
                "Shares of the scores 2, 4, 2 and 1. Equal scores have equal shares at every temperature.",
            ),
            Plate(
                pictures.corners,
                "Two lines that start together at one half and part towards one and zero as the temperature falls.",
                "Pairs that differ in the fourth decimal: together while it is warm, in opposite corners when cold.",
            ),
        ),
    ),
    Section(
        "Other weights than the exponential",
        "Any positive weight can stand in the place of the exponential. Squares and polynomials (spherical and Taylor "
        "softmax) rise on both sides and ever more slowly; the sigsoftmax bends at zero, which frees the shares from "
        "the few dimensions that a softmax is bound to.",
        (
            Plate(
                pictures.weights,
                "Left: the weight of a score under four rules, on a logarithmic scale. Right: the slopes of these.",
                "Where a slope on the right crosses zero, a word stands at its least share: no small step of its score "
                "helps it.",
            ),
        ),
    ),
    Section(
        "Maps that give zeros",
        "A softmax gives every word a share, however small. Sparsemax and entmax give zeros: whole regions of scores "
        "lie on an edge or a corner of the triangle of shares.",
        (
            Plate(
                pictures.sparse,
                "Above: planes of scores coloured by the shares of three words. Below: where a net of scores lands in "
                "the triangle of shares.",
                "Three words; c has the score 0, a and b what the axes say. Above: colours mixed by the shares; white "
                "lines part regions in which three, two or one of the words have any. Below: the net of all scores "
                "from −2.4 to 2.4 in steps of 0.4, as shares; along a blue line the score of a stays, along an orange "
                "one that of b. The softmax only comes near the edges. Argmax knows corners, and ties.",
            ),
        ),
    ),
    Section(
        "Chance",
        "Add random Gumbel numbers to the scores, and the largest is a fair draw from the softmax. A softmax in the "
        "place of that argmax makes a soft draw, through which gradients pass.",
        (
            Plate(
                pictures.gumbel,
                "Clouds of points in four triangles: in the corners when cold, about the middle when warm.",
                "600 soft draws each from shares of 50, 30 and 20 %, coloured by their largest part: whatever the "
                "temperature, about half of them are blue.",
            ),
        ),
    ),
    Section(
        "A sum that needs one look",
        "A sum of exponentials can be too large to write down, so the largest number is taken out of it first. Both "
        "can be kept up as the numbers come: when a larger one arrives, the sum so far shrinks to match. Two halves "
        "that did this apart can be put together, so it works over blocks, machines and streams.",
        (
            Plate(
                pictures.online,
                "Above: 48 numbers, their running maximum and the running log-sum-exp. Below: the running sum, falling "
                "wherever the maximum rises.",
                "48 numbers, each seen once. Vertical lines: a new largest number. In the end the pair (m, s) gives "
                "the log-sum-exp of all of them.",
            ),
        ),
    ),
)


def html() -> str:
    """Return the page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    return environment.get_template("gallery.html.j2").render(sections=SECTIONS, svg=svg, style=style)


def svg(draw: Callable[[pictures.Colours], pictures.Figure]) -> Markup:
    """Return a picture as an SVG element whose colours and font are the page's, and whose ids are its own.

    Drawn in colours that stand for the style sheet's variables, which follow the reader's light or dark setting.
    """
    stand_ins = {name: f"#0{index:x}fe0{index:x}" for index, name in enumerate(pictures.COLOURS)}
    settings = {"svg.fonttype": "none", "svg.hashsalt": "lvsoftmax", "font.family": "sans-serif", "font.size": 9}
    stream = io.StringIO()
    with matplotlib.rc_context(settings):
        draw(stand_ins).savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|\sxmlns(:\w+)?=\"[^\"]*\"", "", text, flags=re.DOTALL)
    text = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{draw.__name__}-", text.replace("xlink:href", "href"))
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    for name, colour in stand_ins.items():
        text = text.replace(colour, f"var(--{name})")
    return Markup(text)


def main() -> None:
    """Write the page to the file named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.gallery", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/gallery.html"), help="the file (%(default)s)")
    output = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(html(), encoding="utf-8")
    print(output)


if __name__ == "__main__":
    main()
