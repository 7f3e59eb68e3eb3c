"""The table of output layers in the README, made from the layers themselves: ``python -m experiments.catalogue``.

A row is a yaml of ``configs/output`` and the class it names: what the layer is stands in its module's docstring, cost
and references in the class's, options in the constructor. Nothing else lists the layers.
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_class
from omegaconf import OmegaConf

from experiments.cli import CONFIGS, one_line_errors
from lvsoftmax.layer import DenseOutputLayer, OutputLayer

README = CONFIGS.parent / "README.md"
BEGIN, END = "<!-- the table of layers: make catalogue -->\n", "<!-- end of the table of layers -->\n"
HEADER = """| `output=` | options | trained on | cost of a training step, per token | from |
| --- | --- | --- | --- | --- |
"""


def table() -> str:
    """Return the table, a row per layer in alphabetical order, as Markdown."""
    return HEADER + "".join(row(path) for path in sorted((CONFIGS / "output").glob("*.yaml")))


def row(path: Path) -> str:
    """Return the row of one layer's yaml."""
    layer = get_class(OmegaConf.load(path)["_target_"])
    module = inspect.getmodule(layer)
    assert module is not None
    told = inspect.getdoc(module)
    if not told:
        raise ValueError(f"{module.__name__} has no docstring: begin the file with a sentence about what the layer is")
    summary = summarised(told)
    cells = [f"`{path.stem}`: {summary}", options(layer), trained_on(layer), cost(layer), sources(layer)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def summarised(text: str) -> str:
    """Return the first sentence of a docstring, to stand after a colon."""
    sentence = text.split("\n\n")[0].replace("\n", " ").rstrip(".")
    first = sentence.split()[0]
    return sentence[0].lower() + sentence[1:] if first == first.capitalize() else sentence


def options(layer: type[OutputLayer]) -> str:
    """Return the parameters with a fixed set of names for their values, the default first."""
    found = []
    hints = get_type_hints(layer.__init__)
    for name, parameter in inspect.signature(layer).parameters.items():
        values = [str(value) for value in names_in(hints.get(name))]
        if values:
            others = [value for value in values if value != str(parameter.default)]
            found.append(f"`{name}`: " + ", ".join([f"**{parameter.default}**", *others]))
    return "; ".join(found)


def names_in(annotation: Any) -> Iterator[Any]:
    """Yield the values of the ``Literal`` in a type."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from names_in(member)


def trained_on(layer: type[OutputLayer]) -> str:
    """Return what the layer's ``forward`` is."""
    if not layer.full_support:
        return "a Fenchel-Young loss; probabilities may be zero"
    return "its likelihood" if layer.forward in (OutputLayer.forward, DenseOutputLayer.forward) else "a surrogate"


def cost(layer: type[OutputLayer]) -> str:
    """Return the number of operations from the docstring's paragraph on cost."""
    paragraph = paragraph_of(layer, "Costs? per token[^:]*:")
    formula = re.search(r"``(.+?)`` FLOPs", paragraph)
    return f"`{formula[1]}` FLOPs" if formula else re.split(r"[;.] ", paragraph)[0].rstrip(".").replace("``", "`")


def sources(layer: type[OutputLayer]) -> str:
    """Return authors and year of the references."""
    found = re.findall(rf"({NAME}(?:(?:, | & |, & ){NAME})*(?: et al\.)?,?) ((?:19|20)\d\d)", references(layer))
    return "; ".join(dict.fromkeys(f"{shortened(authors)} {year}" for authors, year in found))


NAME = r"(?:d[eu] |Gemma )?[A-Z][\w'-]+"


def references(layer: type[OutputLayer]) -> str:
    """Return the docstring's paragraph of references."""
    return paragraph_of(layer, "References?:")


def shortened(authors: str) -> str:
    """Return "First et al." for three authors or more."""
    names = re.split(r", & | & |, ", authors.rstrip(","))
    return f"{names[0]} et al." if len(names) > 2 else " & ".join(names)


def paragraph_of(layer: type[OutputLayer], beginning: str) -> str:
    """Return the paragraph of a class's docstring that begins so, on one line, without the beginning."""
    for paragraph in (inspect.getdoc(layer) or "").split("\n\n"):
        if re.match(beginning, paragraph):
            return " ".join(re.sub(rf"^{beginning}", "", paragraph).split())
    return ""


def main() -> None:
    """Put the table into the README, between its two marks."""
    with one_line_errors():
        write()


def write() -> None:
    """Write the README anew, with the table."""
    before, _, rest = README.read_text("utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{README} lacks the lines {BEGIN.strip()} and {END.strip()}; put them back")
    README.write_text(before + BEGIN + table() + END + after, "utf-8")


if __name__ == "__main__":
    main()
