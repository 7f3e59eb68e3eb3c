"""The problem that contestants are timed on, and what they are once built for it.

An instance is a set of functions of a batch, by mode:

- ``forward``: the training objective of each token, no gradients;
- ``train``: the training loss, and the gradients of hidden vectors and parameters;
- ``per_token``: the same, with an upstream gradient for each token that is known after the forward pass only;
- ``step``: ``train``, then the optimiser's update.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, final

import torch
from omegaconf import OmegaConf
from torch import Tensor

from experiments.cli import CONFIGS
from lvsoftmax.runs import build

PRECISIONS = ("fp32", "bf16", "bf16_parameters")
MODES = ("forward", "train", "per_token", "step")
BATCHES = 4
"""Of each cell, taken in turn: a step finds other rows to touch than the one before it."""

LEARNING_RATE = 1e-4
"""So small that repetitions leave the parameters about where they are: what is timed stays the same."""


class Unavailable(ValueError):
    """A contestant that does not run in a cell; the message says why."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Attributes:
        tokens: N.
        hidden: D.
        vocab: V.
        precision: ``fp32``; ``bf16``: hidden vectors in bf16 and products under autocast, parameters in fp32;
            ``bf16_parameters``: everything in bf16.
        threads: of the CPU.
        device: where.
        optim: the optimiser, a file of ``configs/optim``.
    """

    tokens: int
    hidden: int
    vocab: int
    precision: str = "fp32"
    threads: int = 1
    device: str = "cpu"
    optim: str = "adagrad"

    def __post_init__(self) -> None:
        for name in ("tokens", "hidden", "vocab", "threads"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < (2 if name == "vocab" else 1):
                raise ValueError(
                    f"study.{name}={value}: must be whole numbers of at least {2 if name == 'vocab' else 1}"
                )
        if self.precision not in PRECISIONS:
            raise ValueError(f"study.precision={self.precision}: choose from {', '.join(PRECISIONS)}")

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        where = threads if self.device == "cpu" else self.device
        return f"N {self.tokens:,}, D {self.hidden:,}, V {self.vocab:,}, {self.precision}, {where}"

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Of the hidden vectors."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    @property
    def parameter_dtype(self) -> torch.dtype:
        """Of the parameters."""
        return torch.bfloat16 if self.precision == "bf16_parameters" else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context in which a loss is computed."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext()


class Batch(NamedTuple):
    """What a training step gets from a backbone and a text; ``upstream`` is for the mode ``per_token``."""

    hidden: Tensor
    target: Tensor
    previous: Tensor
    weight: Tensor
    upstream: Tensor


@dataclasses.dataclass(frozen=True)
class Problem:
    """A vocabulary of Zipf's law, and batches of words drawn from it independently."""

    counts: Tensor
    batches: Sequence[Batch]


def zipf_counts(vocab: int) -> Tensor:
    """Return counts that fall as one over the rank, the last of them 4."""
    return (4 * vocab / torch.arange(1, vocab + 1, dtype=torch.float64)).long()


@functools.cache
def problem(cell: Cell) -> Problem:
    """Return the problem of a cell: always the same. A race of many cells takes turns in them; who ends it forgets."""
    generator = torch.Generator().manual_seed(cell.tokens)
    counts = zipf_counts(cell.vocab)
    cumulative = counts.double().cumsum(0)

    def words() -> Tensor:
        draw = torch.rand(cell.tokens, dtype=torch.float64, generator=generator) * cumulative[-1]
        return torch.searchsorted(cumulative, draw).clamp_(max=cell.vocab - 1).to(cell.device)

    def batch() -> Batch:
        hidden = torch.randn(cell.tokens, cell.hidden, generator=generator)
        upstream = torch.rand(cell.tokens, generator=generator) / cell.tokens
        return Batch(
            hidden.to(cell.device, cell.hidden_dtype).requires_grad_(),
            words(),
            words(),
            torch.full((cell.tokens,), 1 / cell.tokens, device=cell.device),
            upstream.to(cell.device),
        )

    return Problem(counts, [batch() for _ in range(BATCHES)])


def dense_table(cell: Cell) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """Return the table ``[V, D]`` and the bias ``[V]``, zero, that every exact peer starts with."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.empty(cell.vocab, cell.hidden).uniform_(-1, 1, generator=generator).mul_(cell.hidden**-0.5)
    bias = torch.zeros(cell.vocab)
    place = {"device": cell.device, "dtype": cell.parameter_dtype}
    return torch.nn.Parameter(weight.to(**place)), torch.nn.Parameter(bias.to(**place))


class Instance(Protocol):
    """A contestant, built.

    Attributes:
        modes: what can be run, by mode, each a function of a batch; ``train`` returns the loss.
        parameters: how many trainable numbers it has.
        counted: whether PyTorch's counters see what it does.
        scale: what its times are to be multiplied by to stand for a batch of the cell's tokens.
    """

    modes: Mapping[str, Callable[[Batch], Any]]
    parameters: int
    counted: bool
    scale: float

    def forget(self, batch: Batch) -> None:
        """Drop what a run has left behind."""
        ...

    def gradient_bytes(self, batch: Batch) -> int:
        """Return the size of the gradients that a run of ``train`` has left behind."""
        ...


Values = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(hidden, target, previous)`` -> the objective of each token."""

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``(hidden, target, weight, previous)`` -> the scalar that training calls."""


@final
class TorchInstance:
    """An instance made of PyTorch functions.

    Args:
        cell: where it runs.
        parameters: what it trains.
        values: the objective per token; None if the contestant has only a mean.
        loss: None for ``sum(weight * values)``.
        counted: whether PyTorch's counters see what it does.
    """

    scale = 1.0

    def __init__(
        self,
        cell: Cell,
        parameters: Iterable[Tensor],
        values: Values | None,
        loss: Loss | None = None,
        *,
        counted: bool = True,
    ) -> None:
        self.cell = cell
        self.counted = counted
        self.trained = list(parameters)
        self.parameters = sum(parameter.numel() for parameter in self.trained)
        self._values = values
        self._loss = loss
        self._optimiser: torch.optim.Optimizer | None = None
        self.modes = {"forward": self._forward, "train": self._train, "step": self._step}
        if values is not None:
            self.modes["per_token"] = self._per_token

    def _forward(self, batch: Batch) -> Tensor:
        with torch.no_grad(), self.cell.autocast():
            if self._values is None:
                return self._loss(batch.hidden, batch.target, batch.weight, batch.previous)
            return self._values(batch.hidden, batch.target, batch.previous)

    def _train(self, batch: Batch) -> Tensor:
        with self.cell.autocast():
            if self._loss is None:
                loss = (batch.weight * self._values(batch.hidden, batch.target, batch.previous)).sum()
            else:
                loss = self._loss(batch.hidden, batch.target, batch.weight, batch.previous)
        loss.backward()
        return loss.detach()

    def _per_token(self, batch: Batch) -> None:
        with self.cell.autocast():
            values = self._values(batch.hidden, batch.target, batch.previous)
        values.backward(batch.upstream.to(values.dtype))

    def _step(self, batch: Batch) -> None:
        if self._optimiser is None:
            method = OmegaConf.load(CONFIGS / "optim" / f"{self.cell.optim}.yaml").method
            self._optimiser = build(OmegaConf.to_container(method), self.trained, lr=LEARNING_RATE)
        self._train(batch)
        self._optimiser.step()
        self._optimiser.zero_grad()

    def forget(self, batch: Batch) -> None:
        """Drop the gradients."""
        for tensor in (batch.hidden, *self.trained):
            tensor.grad = None

    def gradient_bytes(self, batch: Batch) -> int:
        """Return the size of the gradients there are."""
        gradients = [tensor.grad for tensor in (batch.hidden, *self.trained) if tensor.grad is not None]
        parts = [[g._indices(), g._values()] if g.is_sparse else [g] for g in gradients]
        return sum(part.nbytes for part in itertools.chain(*parts))
