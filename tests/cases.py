"""What the laws run over: every yaml of ``configs/output``, and every value of every option, one at a time.

A case is a yaml plus at most one option set to a value other than the yaml's; options are the constructor's parameters
typed ``bool``, ``Literal`` or ``... | None`` (tried at ``None``). Parameters that need data or must be small for a toy
vocabulary are supplied by their names: ``embeddings``, ``bigrams``, ``samples``, ``max_samples``. Nothing here names a
layer, but for the two that try every noise distribution; the others try the fixed ones.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lvsoftmax import runs
from lvsoftmax.layer import DenseOutputLayer, OutputLayer
from lvsoftmax.ops.backends import BackendUnavailable, interprets_triton
from lvsoftmax.ops.noise import Draws, FixedNoiseName

CONFIGS = sorted((Path(__file__).parents[1] / "configs" / "output").glob("*.yaml"))

HIDDEN = 16
TOKENS = 7
SAMPLES = 24
EMBEDDING = 5
WITH_EVERY_NOISE = ("sampled_softmax", "noise_contrastive_estimation")


def zipf_counts(size: int, exponent: float = 1.0) -> Tensor:
    """Counts that fall as ``rank^-exponent``, the last one at least 1."""
    rank = torch.arange(1, size + 1, dtype=torch.float64)
    return (4 * (size / rank) ** exponent).long()


COUNTS = zipf_counts(97)


def toy_bigrams(size: int, seed: int) -> Tensor:
    """Pairs of words: every other word has up to four followers side by side, the rest have none."""
    source = torch.Generator().manual_seed(seed)
    previous = torch.arange(0, size, 2)
    first = torch.randint(size, previous.shape, generator=source)
    follower = (first[:, None] + torch.arange(min(4, size))) % size
    count = torch.randint(1, 6, follower.shape, generator=source)
    return torch.stack([previous[:, None].expand_as(follower), follower, count], 2).flatten(0, 1)


VOCABULARIES = {
    "zipf": COUNTS,
    "two": torch.tensor([3, 1]),
    "one of two never seen": torch.tensor([5, 0]),
    "three alike": torch.tensor([1, 1, 1]),
    "flat": torch.full((64,), 10),
    "one word takes nearly all": torch.tensor([10**9] + [1] * 20 + [0] * 12),
}
"""Sizes and shapes at which bands, classes and trees degenerate."""


@dataclass(frozen=True)
class Case:
    """One yaml, and at most one option changed."""

    name: str
    option: str = ""
    value: Any = None

    def __str__(self) -> str:
        return f"{self.name}-{self.option}={self.value}" if self.option else self.name

    @property
    def config(self) -> DictConfig:
        config = OmegaConf.load(Path(CONFIGS[0].parent, f"{self.name}.yaml"))
        assert isinstance(config, DictConfig)
        if self.option:
            config[self.option] = self.value
        return config

    @property
    def layer_class(self) -> type[OutputLayer]:
        return get_class(self.config["_target_"])  # type: ignore[return-value]

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The constructor's parameters beyond ``self``, ``hidden_size`` and ``counts``."""
        parameters = dict(inspect.signature(self.layer_class.__init__).parameters)
        return {name: parameters[name] for name in list(parameters)[3:]}

    def setting(self, parameter: str) -> Any:
        """This case's value of a parameter; None where the constructor has no such parameter."""
        return self.config.get(parameter)

    def build(
        self, hidden_size: int = HIDDEN, counts: Tensor = COUNTS, *, seed: int = 0, **overrides: Any
    ) -> OutputLayer:
        """Construct the layer under a seed, with toy data for the parameters that need some.

        Skips the test where this case is a backend that cannot run here.
        """
        toy = {
            "embeddings": torch.randn(len(counts), EMBEDDING, generator=torch.Generator().manual_seed(seed)),
            "bigrams": toy_bigrams(len(counts), seed),
            "samples": min(SAMPLES, len(counts)),
            "max_samples": min(SAMPLES, len(counts)),
        }
        toy = {name: value for name, value in toy.items() if name in self.parameters}
        settings = OmegaConf.to_container(self.config)
        assert isinstance(settings, dict)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                layer = runs.build(settings | toy | overrides, hidden_size, counts)
                layer.chosen_backend(torch.device("cpu"))
            except BackendUnavailable as error:
                pytest.skip(str(error))
        return layer

    def skip_if_interpreted(self) -> None:
        """Skip what takes many steps or words where Triton's interpreter runs them, a thousand times slower."""
        if self.value == "triton" and interprets_triton():
            pytest.skip("takes too long in Triton's interpreter")


def option_values(annotation: Any) -> tuple[Any, ...]:
    """The values of a parameter's type that can be listed: all of ``bool`` and ``Literal``, and None where allowed."""
    if annotation is bool:
        return (False, True)
    if annotation is NoneType:
        return (None,)
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return tuple(value for member in get_args(annotation) for value in option_values(member))
    return ()


def _cases() -> Iterator[Case]:
    for path in CONFIGS:
        base = Case(path.stem)
        yield base
        hints = get_type_hints(base.layer_class.__init__)
        for parameter in base.parameters:
            for value in option_values(hints.get(parameter)):
                elsewhere = parameter == "noise" and path.stem not in WITH_EVERY_NOISE
                if value != base.setting(parameter) and not (elsewhere and value not in get_args(FixedNoiseName)):
                    yield Case(path.stem, parameter, value)


CASES = list(_cases())
WITH_FULL_SUPPORT = [case for case in CASES if case.layer_class.full_support]
WITH_PARTIAL_SUPPORT = [case for case in CASES if not case.layer_class.full_support]

for_every_vocabulary = pytest.mark.parametrize("counts", VOCABULARIES.values(), ids=VOCABULARIES.keys())
for_every_case = pytest.mark.parametrize("case", CASES, ids=str)
for_every_case_of_full_support = pytest.mark.parametrize("case", WITH_FULL_SUPPORT, ids=str)
for_every_case_of_partial_support = pytest.mark.parametrize("case", WITH_PARTIAL_SUPPORT, ids=str)
for_every_sparse_case = pytest.mark.parametrize("case", [c for c in CASES if "sparse" in c.parameters], ids=str)


def dense(case: Case) -> dict[str, bool]:
    """Overrides for laws that need dense gradients."""
    return {"sparse": False} if "sparse" in case.parameters else {}


@dataclass(frozen=True)
class Batch:
    """A toy batch. ``hidden`` requires a gradient; ``upstream`` differs per token and has zeros."""

    hidden: Tensor
    target: Tensor
    previous: Tensor
    upstream: Tensor

    @classmethod
    def of(
        cls, layer: OutputLayer, tokens: int = TOKENS, *, dtype: torch.dtype = torch.float64, scale: float = 1.0
    ) -> "Batch":
        generator = torch.Generator().manual_seed(tokens)
        hidden = torch.randn(tokens, layer.hidden_size, generator=generator, dtype=torch.float64) * scale
        target = torch.randint(layer.vocab_size, (tokens,), generator=generator)
        target[1::3] = 0  # the most frequent word, and a word that occurs twice
        previous = torch.randint(layer.vocab_size, (tokens,), generator=generator)
        upstream = torch.randn(tokens, generator=generator, dtype=torch.float64).to(dtype)
        upstream[::3] = 0
        return cls(hidden.to(dtype).requires_grad_(), target, previous, upstream)

    def draw(self, layer: OutputLayer) -> Draws:
        return layer.draw(self.hidden, self.target, self.previous)


def randomise(layer: OutputLayer, scale: float = 0.3) -> OutputLayer:
    """Move every parameter off its start, where symmetries and zeros hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return layer


def noise_probability(layer: DenseOutputLayer, hidden: Tensor, previous: Tensor, draws: int) -> Tensor:
    """What a layer's noise says of every word, as a target of every token: ``[tokens, vocab]``, float64.

    That it is what the noise draws from is for the noise's own tests to show.
    """
    noise, words = layer.noise, torch.arange(layer.vocab_size)
    assert noise is not None
    rows = [
        noise.draw(h.expand(len(words), -1), words, v.expand(len(words)), torch.Generator()).target_log_expected
        for h, v in zip(hidden.detach(), previous, strict=True)
    ]
    return torch.stack(rows).double().exp() / (layer.vocab_size - 1 if noise.holds_targets else draws)


def gradients(output: Tensor, upstream: Tensor, layer: OutputLayer, *inputs: Tensor) -> dict[str, Tensor]:
    """Gradients of ``inputs`` and of the layer's parameters, dense, zero where nothing depends on them."""
    names = [f"input {i}" for i in range(len(inputs))] + [name for name, _ in layer.named_parameters()]
    variables = [*inputs, *layer.parameters()]
    found = torch.autograd.grad(output, variables, upstream, retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(variable) if gradient is None else gradient.to_dense()
        for name, variable, gradient in zip(names, variables, found, strict=True)
    }


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_one_gradient_alone(layer: OutputLayer, wanted: int) -> None:
    """Of hidden vectors, weight and bias, when nothing else needs a gradient: as the definition has it."""
    hidden, target = torch.randn(5, layer.hidden_size), torch.tensor([0, 3, 96, 3, 50])
    variables = [hidden, layer.weight, layer.bias]
    for i, variable in enumerate(variables):
        variable.requires_grad_(i == wanted)
    (actual,) = torch.autograd.grad(layer.nll(hidden, target).sum(), variables[wanted])
    (expected,) = torch.autograd.grad(-layer.log_prob(hidden)[range(5), target].sum(), variables[wanted])
    assert_close(actual.to_dense(), expected, 1e-5)


def assert_strided(layer: OutputLayer) -> None:
    """Inputs, table and upstream gradient that are not contiguous: values and gradients as the definition has them."""
    layer.weight.data = layer.weight.data.T.contiguous().T
    hidden = torch.randn(layer.hidden_size, 10).T[::2].requires_grad_()
    target = torch.randint(97, (10,))[::2]
    actual, expected = layer.nll(hidden, target), -layer.log_prob(hidden)[range(5), target]
    assert_close(actual, expected, 1e-5)
    upstream = torch.tensor(0.3).expand(5)
    for one, other in zip(
        torch.autograd.grad(actual, (hidden, layer.weight), upstream),
        torch.autograd.grad(expected, (hidden, layer.weight), upstream),
        strict=True,
    ):
        assert_close(one.to_dense(), other, 1e-5)


def assert_mean(values: Tensor, expected: Tensor) -> None:
    """The mean of independent ``values`` along the first dimension is ``expected``, within four standard errors."""
    standard_error = values.std(0) / len(values) ** 0.5
    assert ((values.mean(0) - expected).abs() <= 4 * standard_error + 1e-6 * expected.abs()).all()


class LargestResult(TorchDispatchMode):
    """Remembers how many entries the largest dense result of an operation has, and all of them together (``total``)."""

    entries = total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor) and not x.is_sparse:
                self.entries, self.total = max(self.entries, x.numel()), self.total + x.numel()
        return result
