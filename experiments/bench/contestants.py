"""Who is timed: output layers as their files describe them, what a user would otherwise install, the products alone.

A contestant is a small description that can be built in a cell, in this process or in a fresh one.
"""

import dataclasses
import fnmatch
import functools
import importlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from types import NoneType, UnionType
from typing import Any, Literal, Protocol, Union, final, get_args, get_origin, get_type_hints

import torch
import yaml
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import Tensor

from experiments.bench import laws
from experiments.bench.cell import Cell, Instance, TorchInstance, Unavailable, problem
from experiments.bench.peers import modules
from experiments.cli import CONFIGS, nearest
from lvsoftmax.data.statistics import STATISTICS, bigrams
from lvsoftmax.layer import OutputLayer
from lvsoftmax.runs import FROM_TEXT, build


class Contestant(Protocol):
    """What can be built in a cell. Hashable, and small enough to be sent to another process.

    Attributes:
        label: its name, unique within a benchmark.
        kind: ``layer``, ``peer`` or ``limit``.
    """

    label: str
    kind: str

    def build(self, cell: Cell) -> Instance:
        """Build it.

        Raises:
            Unavailable: it does not run in this cell.
        """
        ...

    def check(self, cell: Cell) -> None:
        """Build a small one on the cell's device, in its precision, and see that it computes what it should.

        Raises:
            Unavailable: it does not, or does not run there.
        """
        ...


@final
@dataclasses.dataclass(frozen=True)
class Layer:
    """An output layer: a file of ``configs/output`` and options that differ from it."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    kind = "layer"

    @property
    def label(self) -> str:
        """The name, and the options as they are written on a command line."""
        options = ", ".join(f"{name}={_written(value)}" for name, value in self.options)
        return f"{self.name}({options})" if options else self.name

    @property
    def config(self) -> dict[str, Any]:
        """Every parameter of the constructor."""
        file = CONFIGS / "output" / f"{self.name}.yaml"
        if not file.exists():
            raise Unavailable("not there: no such output layer")
        config = OmegaConf.to_container(OmegaConf.load(file))
        for option, value in self.options:
            if option not in config:
                raise Unavailable(f"not there: {self.name} has no option {option}")
            config[option] = list(value) if isinstance(value, tuple) else value
        return config

    @property
    def eager(self) -> "Layer":
        """The same in plain PyTorch, whose operations can be counted."""
        if "backend" not in self.config:
            return self
        return Layer(self.name, tuple((dict(self.options) | {"backend": "eager"}).items()))

    def make(self, hidden_size: int, counts: Tensor) -> OutputLayer:
        """Construct the layer; what it may ask of a text is taken from words drawn independently.

        Raises:
            Unavailable: the constructor refuses.
        """
        config, optional = self.config, {}
        for name in STATISTICS:
            if config.get(name) == FROM_TEXT:
                config[name] = _statistic(name, counts)
            elif name in config and config[name] is None:
                optional[name] = functools.partial(_statistic, name, counts)
        try:
            return self._make(config, hidden_size, counts)
        except ValueError as error:
            # Nothing may be a setting of its own, such as a tree over no vectors: it is kept where it can be.
            if not optional:
                raise Unavailable(str(error)) from error
        try:
            return self._make(config | {name: made() for name, made in optional.items()}, hidden_size, counts)
        except ValueError as error:
            raise Unavailable(str(error)) from error

    def _make(self, config: dict[str, Any], hidden_size: int, counts: Tensor) -> OutputLayer:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build(config, hidden_size, counts)

    def build(self, cell: Cell) -> TorchInstance:
        """Construct the layer and announce the batches' targets to it."""
        task = problem(cell)
        layer = self.make(cell.hidden, task.counts).to(cell.device)
        for parameter in layer.parameters():
            parameter.data = parameter.data.to(cell.parameter_dtype)
        layer.observe(torch.cat([batch.target for batch in task.batches]))
        layer.refresh()
        return TorchInstance(cell, layer.parameters(), layer, layer.loss)

    def check(self, cell: Cell) -> None:
        """Hold a small layer to the laws that its figures rest on."""
        small = dataclasses.replace(cell, tokens=13, hidden=16, vocab=10_007, precision="fp32")
        with laws.reported():
            task = problem(small)
            broken = laws.broken_law(self.make(small.hidden, task.counts).to(small.device), task.batches[0])
            if not broken and cell.precision != "fp32":
                exact, rounded = (self._loss(dataclasses.replace(small, precision=p)) for p in ("fp32", cell.precision))
                if not abs(rounded - exact) <= 0.02 * abs(exact):
                    broken = f"its loss is {rounded:.4g} in {cell.precision}, {exact:.4g} in fp32"
        if broken:
            raise Unavailable(broken)

    def _loss(self, cell: Cell) -> float:
        batch = problem(cell).batches[0]
        instance = self.build(cell)
        loss = float(instance.modes["train"](batch))
        instance.forget(batch)
        return loss


@final
@dataclasses.dataclass(frozen=True)
class Peer:
    """An alternative that a user could install: a variant of a module of ``experiments/bench/peers``."""

    module: str
    label: str
    kind = "peer"

    def build(self, cell: Cell) -> Instance:
        """Build it; its package is imported here and not before.

        Raises:
            Unavailable: the package is not installed, or does not run here.
        """
        try:
            return self._module.build(cell, **self._module.VARIANTS[self.label])
        except ImportError as error:
            raise Unavailable(f"not installed: {self._module.INSTALL} ({error})") from error

    def check(self, cell: Cell) -> None:
        """See that one which claims to be exact has the loss and the gradient of the full softmax."""
        small = dataclasses.replace(cell, tokens=16, hidden=16, vocab=10_007)
        with laws.reported():
            instance = self.build(small)
            wrong = laws.difference_to_full_softmax(instance, small) if self._module.EXACT else ""
        if wrong:
            raise Unavailable(wrong)

    @property
    def _module(self) -> Any:
        return importlib.import_module(f"experiments.bench.peers.{self.module}")


def layers(patterns: Iterable[str]) -> list[Layer]:
    """Return the layers that patterns stand for, each once, in order.

    A pattern is a name, or a name with ``*``, of a file of ``configs/output``, and options in brackets:
    ``sampled_softmax(samples=1024, replacement=true)``. As a value, ``*`` stands for every value that the option's type
    lists; ``(*)`` stands for the layer as it is, and then every value of every option, one at a time. A layer without
    the option that a ``*`` is given for is left out.

    Raises:
        ValueError: a pattern that is none, or a name that is not there.
    """
    there = sorted(file.stem for file in (CONFIGS / "output").glob("*.yaml"))
    found: dict[Layer, None] = {}
    for pattern in patterns:
        match = re.fullmatch(r"([\w*?]+)(?:\((.*)\))?", pattern.strip())
        if not match:
            raise ValueError(f"study.layers={pattern}: write name or name(option=value, ...)")
        name, options = match.groups()
        names = fnmatch.filter(there, name)
        if not names and "*" not in name:
            raise ValueError(f"study.layers={pattern}: no such output layer{nearest(name, there)}")
        for each in names:
            found |= dict.fromkeys(_expanded(Layer(each), options or ""))
    return list(found)


def _expanded(layer: Layer, options: str) -> Iterator[Layer]:
    if options.strip() == "*":
        yield layer
        for option in layer.config:
            yield from (Layer(layer.name, ((option, value),)) for value in option_values(layer, option))
        return
    given = yaml.safe_load("{" + options.replace("=*", "='*'").replace("=", ": ") + "}")
    if any(option not in layer.config for option, value in given.items() if value == "*"):
        return
    choices = [option_values(layer, option) if value == "*" else [value] for option, value in given.items()]
    for values in itertools.product(*choices):
        plain = (tuple(value) if isinstance(value, list) else value for value in values)
        yield Layer(layer.name, tuple(zip(given, plain, strict=True)))


def option_values(layer: Layer, option: str) -> list[Any]:
    """Return the values that an option's type lists, the file's own left out."""
    hint = get_type_hints(get_class(layer.config["_target_"]).__init__).get(option)
    return [value for value in _listed(hint) if value != layer.config.get(option)]


def _listed(hint: Any) -> tuple[Any, ...]:
    if hint is bool:
        return (True, False)
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return tuple(value for member in get_args(hint) if member is not NoneType for value in _listed(member))
    return ()


def peers(patterns: Iterable[str]) -> list[Peer]:
    """Return the peers whose labels match.

    Raises:
        ValueError: a pattern without ``*`` that matches nothing.
    """
    there = [Peer(name, label) for name, module in modules().items() for label in module.VARIANTS]
    chosen: dict[Peer, None] = {}
    for pattern in patterns:
        matches = [peer for peer in there if fnmatch.fnmatchcase(peer.label, pattern)]
        if not matches and "*" not in pattern:
            raise ValueError(f"study.peers={pattern}: no such peer{nearest(pattern, [peer.label for peer in there])}")
        chosen |= dict.fromkeys(matches)
    return list(chosen)


def _written(value: Any) -> str:
    """Return a value as a yaml would have it."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_written, value))}]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def _statistic(name: str, counts: Tensor) -> Tensor:
    """Return a statistic of a text of the counts' words in random order, of about 20 tokens per word."""
    generator = torch.Generator().manual_seed(3)
    if name == "bigrams":
        cumulative = counts.double().cumsum(0)
        draw = torch.rand(min(20 * len(counts), 2_000_000), dtype=torch.float64, generator=generator)
        ids = torch.searchsorted(cumulative, draw * cumulative[-1]).clamp_(max=len(counts) - 1)
        return torch.from_numpy(bigrams(ids.numpy(), len(counts)))
    return torch.randn(len(counts), 16, generator=generator)
