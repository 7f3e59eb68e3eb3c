"""Figures for documents: their fonts are in them, and the same figure gives the same bytes in every process."""

import subprocess
import sys
import warnings

from experiments.drawing import Axis, Chart, Line
from experiments.stills import to_files
from experiments.style import STYLES

TWICE = """
from experiments.drawing import Axis, Chart, Line
from experiments.stills import to_files
from experiments.style import STYLES
import hashlib
for content in to_files(Chart([Line("A × B", STYLES[0], [1, 2], [3, 4], ["", ""])], Axis("x"), Axis("y"))).values():
    print(hashlib.sha256(content).hexdigest())
"""


def drawn(label: str) -> dict[str, bytes]:
    return to_files(Chart([Line(label, STYLES[0], [1, 2], [3, 4], ["", ""])], Axis("x"), Axis("y")))


def test_a_pdf_holds_the_letters_it_uses_as_outlines_that_journals_take():
    content = drawn("A × B − 10 %")["pdf"]
    assert b"+SmallDejaVuSans" in content and b"/FontFile2" in content and b"/Type3" not in content
    assert len(content) < 20_000


def test_other_letters_come_from_the_whole_font():
    with warnings.catch_warnings(action="error"):  # Matplotlib's for a letter that no font has
        content = drawn("Жуковский")["pdf"]
    assert b"+DejaVuSans" in content and b"+SmallDejaVuSans" in content


def test_the_same_figure_gives_the_same_bytes_in_every_process():
    one, other = (
        subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert one == other and len(one.split()) == 2
