"""How layers are drawn: colours, markers and dashes that tell one from another."""

import dataclasses
import itertools
import math
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Style:
    """How a layer is drawn, everywhere: ``key`` names its colour in the page's style sheet."""

    key: str
    colour: str
    marker: str
    dash: str


# Okabe and Ito's colours without the yellow, which vanishes on white; the reference is drawn in the colour of the text.
# Each has a marker of its own, so that nothing hangs on colour alone.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#c4609a", "#d08a00", "#4aa3d8")
MARKERS = ("square", "diamond", "triangle-up", "triangle-down", "pentagon", "x")
DASHES = ("solid", "dash", "dot", "dashdot")

OF_REFERENCE = Style("ink", "#1a1a1a", "circle", "solid")


# No two alike: colour by colour, each time round with other markers and dashes.
STYLES = tuple(
    Style(f"layer-{place}", colour, MARKERS[(place + cycle) % len(MARKERS)], DASHES[cycle % len(DASHES)])
    for cycle in range(math.lcm(len(MARKERS), len(DASHES)))
    for place, colour in enumerate(COLOURS)
)


def styles() -> Iterator[Style]:
    """Yield style after style, and begin again after the last."""
    return itertools.cycle(STYLES)
