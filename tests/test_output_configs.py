"""The folder of yamls is the registry: yaml, file, class, constructor and docstring must agree."""

import inspect
import re
from pathlib import Path
from typing import Literal, get_origin, get_type_hints

import pytest
import torch
from cases import CASES, COUNTS, Batch, Case, for_every_case, option_values, zipf_counts
from omegaconf import OmegaConf

import lvsoftmax.layers
from lvsoftmax import optim
from lvsoftmax.layer import DenseOutputLayer, OutputLayer

MODULES = sorted(path.stem for path in Path(lvsoftmax.layers.__path__[0]).glob("[!_]*.py"))
YAMLS = [case for case in CASES if not case.option]

for_every_yaml = pytest.mark.parametrize("case", YAMLS, ids=str)


def literals() -> list[tuple[Case, str]]:
    """Every parameter with a fixed set of names for its values."""
    return [
        (case, name)
        for case in YAMLS
        for name, hint in get_type_hints(case.layer_class.__init__).items()
        if get_origin(hint) is Literal
    ]


def plain(value):
    """A default as yaml would hold it."""
    return [plain(x) for x in value] if isinstance(value, tuple | list) else value


# -- one name ---------------------------------------------------------------------------------------------------------


def test_every_file_has_a_yaml_and_every_yaml_a_file():
    assert [case.name for case in YAMLS] == MODULES


@for_every_yaml
def test_yaml_file_and_class_share_a_name(case):
    words = "".join(part.capitalize() for part in case.name.split("_"))
    assert case.config["_target_"] == f"lvsoftmax.layers.{case.name}.{words}"


@for_every_yaml
def test_a_layer_is_one_final_class(case):
    layer_class = case.layer_class
    assert layer_class.__bases__ in ((OutputLayer,), (DenseOutputLayer,))
    assert not layer_class.__subclasses__()
    module = inspect.getmodule(layer_class)
    own = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    assert [c for c in own if issubclass(c, OutputLayer)] == [layer_class]


# -- the constructor is the schema ------------------------------------------------------------------------------------


@for_every_yaml
def test_the_yaml_lists_every_parameter_at_its_default(case):
    defaults = {name: plain(parameter.default) for name, parameter in case.parameters.items()}
    listed = OmegaConf.to_container(case.config)
    del listed["_target_"]
    assert listed == defaults


@for_every_yaml
def test_parameters_are_keyword_only_after_hidden_size_and_counts(case):
    first, *others = inspect.signature(case.layer_class).parameters.values()
    assert [first.name, others[0].name] == ["hidden_size", "counts"]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in others[1:])


@for_every_yaml
def test_the_docstring_has_formula_cost_reference_and_every_parameter(case):
    text = inspect.getdoc(case.layer_class) or ""
    assert re.search(r"``[^`]+=[^`]+``|::\n\n    .*=", text), "a formula: ``p(w | h) = ...``"
    assert re.search(r"Cost(s)? per token", text), 'a paragraph "Cost per token: ..."'
    assert re.search(r"References?: .*\b(19|20)\d\d\b", text, re.DOTALL), '"Reference: Author year, title, equation"'
    described = re.findall(r"^    (\w+): ", text.partition("\nArgs:\n")[2].partition("\nRaises:\n")[0], re.MULTILINE)
    assert described == ["hidden_size", "counts", *case.parameters]


# -- any vocabulary ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 97, 1000, 20_000])
@for_every_case
def test_one_yaml_builds_and_trains_at_any_vocabulary(case, size):
    if size > 1000:
        case.skip_if_interpreted()
    yaml_decides = {name: case.setting(name) for name in ("samples", "max_samples") if name in case.parameters}
    layer = case.build(counts=zipf_counts(size), **yaml_decides)
    batch = Batch.of(layer, dtype=torch.float32)
    loss = layer.loss(batch.hidden, batch.target, torch.full((7,), 1 / 7), batch.previous)
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize(
    "case",
    [
        Case(case.name, "noise", value)
        for case in YAMLS
        if "noise" in case.parameters
        for value in option_values(get_type_hints(case.layer_class.__init__)["noise"])
    ],
    ids=str,
)
def test_every_noise_builds_with_the_other_defaults_and_takes_a_step(case):
    layer = case.build()
    batch = Batch.of(layer, dtype=torch.float32)
    layer.observe(batch.target)
    layer.refresh()
    before = [parameter.clone() for parameter in layer.parameters()]
    layer.loss(batch.hidden, batch.target, torch.full((7,), 1 / 7), batch.previous).backward()
    optim.SGD(layer.parameters(), lr=0.1).step()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    assert any(not torch.equal(one, two) for one, two in zip(before, layer.parameters(), strict=True))


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("hidden_size", {"hidden_size": 0}),
        ("counts", {"counts": torch.tensor([5])}),
        ("counts", {"counts": torch.tensor([1, 2])}),
        ("counts", {"counts": torch.tensor([1, -1])}),
        ("counts", {"counts": torch.tensor([0, 0])}),
        ("counts", {"counts": torch.tensor([1.0, float("nan")])}),
        ("counts", {"counts": torch.ones(3, 3)}),
    ],
    ids=["no width", "one word", "rising", "negative", "all zero", "not a number", "two dimensions"],
)
@for_every_yaml
@pytest.mark.usefixtures("without_type_checks")
def test_impossible_sizes_and_counts_are_named(case, field, given):
    with pytest.raises(ValueError, match=rf"^{field}.*$") as error:
        case.layer_class(**{"hidden_size": 16, "counts": COUNTS, **given})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("case", "parameter"), literals(), ids=lambda x: str(x))
@pytest.mark.usefixtures("without_type_checks")
def test_an_unknown_choice_is_named(case, parameter):
    with pytest.raises(ValueError, match=rf"^{parameter}='nonsense'.*$") as error:
        case.layer_class(16, COUNTS, **{parameter: "nonsense"})
    assert "\n" not in str(error.value)
