import inspect

import pytest
from cases import CASES, Case
from hydra.utils import get_class
from omegaconf import OmegaConf

from experiments import catalogue

YAMLS = [case for case in CASES if not case.option]


@pytest.mark.parametrize("case", YAMLS, ids=str)
def test_every_cell_says_something(case: Case):
    row = catalogue.row(catalogue.CONFIGS / "output" / f"{case.name}.yaml")
    name, options, trained_on, cost, sources = (cell.strip() for cell in row.replace("\\|", "/").split("|")[1:-1])
    assert name.startswith(f"`{case.name}`: ") and len(name) > len(case.name) + 10
    assert all(f"`{option}`" in options for option in case.parameters if literal(case, option))
    assert trained_on and cost and sources


def literal(case: Case, option: str) -> bool:
    hints = inspect.get_annotations(case.layer_class.__init__)
    return bool(list(catalogue.names_in(hints[option])))


def test_the_readme_says_what_the_layers_say():
    """Rows may be missing until ``make catalogue``, so that a new layer is two files; none may be wrong."""
    listed = catalogue.README.read_text("utf-8").partition(catalogue.BEGIN)[2].partition(catalogue.END)[0]
    assert listed.startswith(catalogue.HEADER)
    rows = listed.removeprefix(catalogue.HEADER).splitlines(keepends=True)
    assert len(rows) >= 5
    for row in rows:
        assert row in catalogue.table()


def test_a_surrogate_is_called_one():
    for case in YAMLS:
        layer = get_class(OmegaConf.load(catalogue.CONFIGS / "output" / f"{case.name}.yaml")["_target_"])
        assert (catalogue.trained_on(layer) == "its likelihood") == ("forward" not in vars(layer))


def test_a_file_without_a_docstring_is_named(monkeypatch):
    layer = YAMLS[0].layer_class
    monkeypatch.setattr(inspect.getmodule(layer), "__doc__", None)
    with pytest.raises(ValueError, match=f"{layer.__module__} has no docstring: begin the file with a sentence"):
        catalogue.row(catalogue.CONFIGS / "output" / f"{YAMLS[0].name}.yaml")


def test_authors_are_shortened():
    assert catalogue.shortened("Mikolov, Sutskever & Chen") == "Mikolov et al."
    assert catalogue.shortened("Mnih & Teh,") == "Mnih & Teh"
