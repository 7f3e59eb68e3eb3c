"""The one interface: what every output layer is, and the dense table that most of them share.

Letters in shapes: ``tokens`` in a batch, ``hidden`` size, ``vocab`` size. Word ids are frequency ranks: word 0 is the
most frequent one. Log-probabilities and losses are in nats.
"""

import math
import zlib
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lvsoftmax.checked import check_methods
from lvsoftmax.noise import Noise
from lvsoftmax.ops.backends import Backends
from lvsoftmax.ops.buffers import empty_table
from lvsoftmax.ops.gumbel import gumbel_argmax
from lvsoftmax.ops.linear_cross_entropy import (
    BACKENDS,
    NORMALISED_BACKENDS,
    linear_cross_entropy,
    linear_cross_entropy_loss,
    linear_logsumexp,
    normalised_cross_entropy,
    normalised_cross_entropy_loss,
    soft_capped,
)
from lvsoftmax.ops.noise import Draws
from lvsoftmax.ops.normalisers import Exponential, Normaliser, log_normalise
from lvsoftmax.ops.numerics import upcast
from lvsoftmax.ops.softmax import logsumexp


class OutputLayer(nn.Module, ABC):
    """A distribution over ``vocab`` words given a hidden vector.

    ``log_prob`` defines a layer: a class with only a constructor and ``log_prob`` is complete and correct. ``nll``,
    ``loss``, ``topk`` and ``sample`` may be overridden, only to be faster. A layer that does not define ``forward``
    trains on its exact likelihood; one that does is a surrogate, and is still evaluated exactly through ``nll``.

    What methods of hidden vectors are given is checked before they run, in every layer, once: not again where they call
    each other. A ``ValueError`` names what has the wrong shape, type or device. Target ids outside the vocabulary are
    found on the CPU only. Nothing is checked inside ``torch.compile``.

    Args:
        hidden_size: D, the width of the hidden vectors.
        counts: ``[vocab]`` training frequency of each word, non-increasing (ids are ranks), finite, not all zero.
        backend: one of ``backends``, or ``auto``: the first of them that can run on the device of the call.

    Raises:
        ValueError: ``hidden_size`` or ``counts`` cannot describe a layer; ``backend`` cannot run here.
    """

    full_support: bool = True
    """False when probabilities may be exactly zero (sparsemax, entmax)."""

    backends: Backends = Backends()
    """What can compute the training objective; a layer with a choice has a parameter ``backend``."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        check_methods(cls)

    def __init__(self, hidden_size: int, counts: Tensor, *, backend: str = "auto") -> None:
        super().__init__()
        check_counts(counts)
        self.backends.check(backend)
        self.backend = backend
        if hidden_size < 1:
            raise ValueError(f"hidden_size={hidden_size}: must be at least 1")
        self.hidden_size = hidden_size
        self.vocab_size = len(counts)
        self._seed = torch.initial_seed() ^ zlib.crc32(type(self).__name__.encode())
        self._generators: dict[str, torch.Generator] = {}
        self._generator_states: dict[str, Tensor] = {}

    # -- the distribution ---------------------------------------------------------------------------------------

    @abstractmethod
    def log_prob(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        """Return the log-probability of every word: exact, normalised, differentiable."""

    def nll(self, hidden: Float[Tensor, "tokens hidden"], target: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
        """Return the exact ``-log p(target | hidden)`` of each token, in nats."""
        return -self.log_prob(hidden).gather(1, target[:, None]).squeeze(1)

    def topk(
        self, hidden: Float[Tensor, "tokens hidden"], k: int
    ) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
        """Return the ``k`` largest log-probabilities and their word ids, in falling order."""
        values, ids = self.log_prob(hidden).topk(k, dim=1)
        return values, ids

    def sample(self, hidden: Float[Tensor, "tokens hidden"], temperature: float = 1.0) -> Int[Tensor, "tokens"]:
        """Draw one word per token from ``p^(1/temperature)``; temperature 0 takes the most probable word."""
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature={temperature}: must be a finite number and not negative")
        with torch.no_grad():
            log_prob = self.log_prob(hidden)
            if temperature == 0:
                return log_prob.argmax(1)
            # However cold, the most probable word keeps its place.
            scores = (log_prob - log_prob.amax(1, keepdim=True)) / temperature
            return gumbel_argmax(scores, self.generator(hidden.device))

    def log_partition(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens"] | None:
        """Return the log of the sum that normalises each token's scores; None where the layer has none."""
        return None

    def log_prob_and_partition(
        self, hidden: Float[Tensor, "tokens hidden"]
    ) -> tuple[Float[Tensor, "tokens vocab"], Float[Tensor, "tokens"] | None]:
        """Return ``log_prob`` and ``log_partition``; overridden where one product gives both."""
        return self.log_prob(hidden), self.log_partition(hidden)

    # -- training -----------------------------------------------------------------------------------------------

    def draw(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
    ) -> Draws:
        """Draw the random part of ``forward``, from this layer's own generator; None for layers without one."""
        return None

    def forward(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Draws = None,
    ) -> Float[Tensor, "tokens"]:
        """Return the training objective of each token, in nats.

        Args:
            hidden: hidden vectors.
            target: the word to predict, in ``[0, vocab)``.
            previous: the word before each target; serves conditional noise and is ignored by everyone else.
            sample: what ``draw`` returned, where the draws are to be given; drawn here otherwise.

        Returns:
            One value per token. The exact negative log-likelihood, unless the layer is a surrogate.
        """
        return self.nll(hidden, target)

    def loss(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        weight: Float[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Draws = None,
    ) -> Float[Tensor, ""]:
        """Return ``sum(weight * forward)``: what training calls.

        The weights (a mask, one over a count) are known before the forward pass, so that a layer may compute its
        gradients there.
        """
        return (weight * self(hidden, target, previous, sample)).sum()

    def embed(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... hidden"]:
        """Look ``ids`` up in the output table, for a model that ties its input embedding to it.

        Raises:
            ValueError: the layer has no row per word.
        """
        raise ValueError(f"{type(self).__name__} has no table with one row per word to tie to; set model.tie=false")

    def observe(self, target: Int[Tensor, "..."]) -> None:
        """Announce a stretch of coming training targets; the layer may adapt its buffers to them."""

    def refresh(self) -> None:
        """Rebuild whatever follows the parameters (adaptive noise); called at intervals by the training loop."""

    def chosen_backend(self, device: torch.device) -> str:
        """Return the name of the backend that computes the training objective on ``device``."""
        return self.backends.choose(self.backend, device)

    def resolved(self) -> dict[str, Any]:
        """Return those of the constructor's arguments that were ``auto``, with the values they took on this machine.

        Only what the layer's shapes or numbers depend on: with these arguments it can be built again elsewhere.
        """
        return {}

    def diagnostics(self) -> dict[str, float]:
        """Return the layer's own numbers worth logging, about its latest training step."""
        return {}

    # -- randomness ---------------------------------------------------------------------------------------------

    def generator(self, device: torch.device) -> torch.Generator:
        """Return this layer's own random stream on ``device``; the global one is never touched.

        Raises:
            RuntimeError: during a backward pass, which may only compute again what was drawn before.
        """
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "a checkpoint computes the objective again, and would draw other words; draw outside of it, "
                "sample = layer.draw(hidden, target, previous), and give them: layer.loss(..., sample=sample)"
            )
        if device.type != "cpu" and device.index is None:  # "cuda" is what tensors call "cuda:0"
            device = torch.empty(0, device=device).device
        key = str(device)
        if key not in self._generators:
            self._generators[key] = torch.Generator(device).manual_seed(self._seed)
            if key in self._generator_states:
                self._generators[key].set_state(self._generator_states.pop(key).cpu())
        return self._generators[key]

    def generator_state(self) -> dict[str, Tensor]:
        """Return the states of the random streams used so far, for a checkpoint."""
        used = {device: generator.get_state() for device, generator in self._generators.items()}
        return self._generator_states | used

    def load_generator_state(self, state: dict[str, Tensor]) -> None:
        """Continue the random streams of a checkpoint, each when it is next used: this machine may lack its device."""
        self._generators.clear()
        self._generator_states = dict(state)

    def __getstate__(self) -> dict[str, Any]:
        # Generators cannot be copied or pickled; their states can.
        state = self.__dict__.copy()
        state["_generators"], state["_generator_states"] = {}, self.generator_state()
        return state


check_methods(OutputLayer)


class DenseOutputLayer(OutputLayer):
    """One table with a row per word, ``logits = hidden @ weight.T + bias``, and what normalises them.

    Probabilities are a positive weight of each logit over the sum of the weights: the exponential, or what the
    constructor names as ``normaliser``. ``nll`` and ``loss`` go through :mod:`lvsoftmax.ops.linear_cross_entropy` and
    never hold ``[tokens, vocab]``. What is no weight of each logit overrides the hook ``normalise`` and gives that up.
    Surrogates over the table differ in ``forward`` (and ``loss``) only.

    The table starts uniform in ``+-1/sqrt(hidden_size)``, the bias at the logits of the words' relative frequency (each
    count raised by one), so that an untrained layer already predicts about the unigram distribution.

    Args:
        hidden_size: D, the width of the hidden vectors.
        counts: ``[vocab]`` training frequency of each word, non-increasing.
        bias: whether words have a bias.
        sparse: row-sparse gradients of the table and the bias, for objectives that touch few rows.
        backend: one of ``backends``, or ``auto``.
        normaliser: the weight of a logit.
    """

    softcap: float | None = None
    """Logits are ``softcap * tanh(logit / softcap)``; None leaves them as they are."""

    noise: Noise | None
    """Where an objective draws words from: set by the constructors of those that do."""

    def __init__(
        self,
        hidden_size: int,
        counts: Tensor,
        *,
        bias: bool = True,
        sparse: bool = False,
        backend: str = "auto",
        normaliser: Normaliser = Exponential(),  # noqa: B008
    ) -> None:
        super().__init__(hidden_size, counts, backend=backend)
        self.normaliser = normaliser
        self.sparse = sparse
        self.noise = None
        self.weight = nn.Parameter(empty_table(self.vocab_size, hidden_size))
        self.bias = nn.Parameter(normaliser.scores(unigram_log_prob(counts))) if bias else None
        nn.init.uniform_(self.weight, -1 / math.sqrt(hidden_size), 1 / math.sqrt(hidden_size))

    def normalise(self, logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens vocab"]:
        """Turn logits into log-probabilities; the hook for what is no elementwise weight."""
        return log_normalise(logits, self.normaliser, dim=1)

    def operands(self, hidden: Float[Tensor, "tokens hidden"]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return hidden, table and bias as they enter the product; the hook for scaling the logits."""
        return hidden, self.weight, self.bias

    def logits(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        """Return the score of every word."""
        return soft_capped(F.linear(*self.operands(hidden)), self.softcap)

    def log_prob(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        """Return the normalised logits."""
        return self.normalise(self.logits(hidden))

    def nll(self, hidden: Float[Tensor, "tokens hidden"], target: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
        """Return the exact negative log-likelihood, without ``[tokens, vocab]`` under the default hook."""
        if not self._normalises_by_weight():
            return super().nll(hidden, target)
        if isinstance(self.normaliser, Exponential):
            return linear_cross_entropy(*self.operands(hidden), target, **self._exact_options())
        backend = self._backend_of(NORMALISED_BACKENDS)
        return normalised_cross_entropy(*self.operands(hidden), target, self.normaliser, backend=backend)

    def loss(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        weight: Float[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Draws = None,
    ) -> Float[Tensor, ""]:
        """Return ``sum(weight * forward)``; exact layers under the default hook take gradients on the way."""
        if not self._normalises_by_weight() or type(self).forward is not OutputLayer.forward:
            return super().loss(hidden, target, weight, previous, sample)
        if isinstance(self.normaliser, Exponential):
            return linear_cross_entropy_loss(*self.operands(hidden), target, weight, **self._exact_options())
        backend = self._backend_of(NORMALISED_BACKENDS)
        return normalised_cross_entropy_loss(*self.operands(hidden), target, weight, self.normaliser, backend=backend)

    def log_partition(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens"] | None:
        """Return the log of the sum of the weights, under the default hook."""
        if not self._normalises_by_weight():
            return None
        if isinstance(self.normaliser, Exponential):
            return linear_logsumexp(*self.operands(hidden), **self._exact_options())
        return logsumexp(self.normaliser.log_weight(self.logits(hidden)), dim=1)

    def log_prob_and_partition(
        self, hidden: Float[Tensor, "tokens hidden"]
    ) -> tuple[Float[Tensor, "tokens vocab"], Float[Tensor, "tokens"] | None]:
        """Return both from one product, under the default hook."""
        if not self._normalises_by_weight():
            return super().log_prob_and_partition(hidden)
        logits = self.logits(hidden)
        log_prob = self.normalise(logits)
        return log_prob, self.normaliser.log_weight(upcast(logits[:, :1])).squeeze(1) - log_prob[:, 0]

    def draw(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
    ) -> Draws:
        """Draw words from the layer's noise."""
        if self.noise is None:
            return None
        return self.noise.draw(hidden.detach(), target, previous, self.generator(hidden.device))

    def observe(self, target: Int[Tensor, "..."]) -> None:
        """Show the noise what is coming."""
        if self.noise is not None:
            self.noise.observe(target)

    def refresh(self) -> None:
        """Let the noise follow the table."""
        if self.noise is not None:
            self.noise.refresh(self.weight.detach(), None if self.bias is None else self.bias.detach())

    def embed(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... hidden"]:
        """Look ``ids`` up in the table."""
        return F.embedding(ids, self.weight, sparse=self.sparse)

    def _exact_options(self) -> dict[str, Any]:
        return {"softcap": self.softcap, "backend": self._backend_of(BACKENDS)}

    def _backend_of(self, backends: Backends) -> str:
        # The backends of a surrogate may have other names; the exact operation then takes the best of its own.
        return self.backend if self.backends is backends or self.backend == "eager" else "auto"

    def _normalises_by_weight(self) -> bool:
        return type(self).normalise is DenseOutputLayer.normalise


def check_counts(counts: Tensor) -> None:
    """Raise ``ValueError`` unless ``counts`` are the frequencies of at least two words ranked by them."""
    check_frequencies(counts)
    rising = (counts[1:] > counts[:-1]).nonzero()
    if len(rising):
        first = int(rising[0]) + 1
        raise ValueError(
            f"counts must not increase (word ids are frequency ranks), but counts[{first}]={counts[first].item()} > "
            f"counts[{first - 1}]={counts[first - 1].item()}; number the words by frequency, or build the layer with "
            "lvsoftmax.permuted.Permuted.from_counts, which takes ids in any order"
        )


def check_frequencies(counts: Tensor) -> None:
    """Raise ``ValueError`` unless ``counts`` are the frequencies of at least two words, in any order."""
    if not isinstance(counts, Tensor):
        raise ValueError(f"counts is a {type(counts).__name__}: it must be a tensor; give torch.as_tensor(counts)")
    if counts.ndim != 1:
        raise ValueError(f"counts has shape {tuple(counts.shape)}: it must be of one dimension, [vocab]")
    built_on = torch.get_default_device()
    if not counts.is_cpu and counts.device.type != built_on.type:
        raise ValueError(
            f"counts is on {counts.device}, and layers are built on {built_on}; give counts.cpu() and move the layer, "
            f"layer.to({str(counts.device)!r})"
        )
    if len(counts) < 2:
        raise ValueError(f"counts has {len(counts)} words: a distribution needs at least 2; lower data.min_count")
    if not torch.isfinite(counts).all() or (counts < 0).any():
        raise ValueError(f"counts must be finite and not negative; the smallest is {counts.min().item()}")
    if not (counts > 0).any():
        raise ValueError("counts are all zero; count the words of the training text")
    if counts.max() < 1:
        raise ValueError(f"counts are at most {counts.max().item()}: give how often words occur, not their shares")


def unigram_log_prob(counts: Tensor) -> Tensor:
    """Return the log of the relative frequencies with one added to every count, so that none is zero."""
    raised = counts.double() + 1
    return (raised / raised.sum()).log().to(torch.promote_types(torch.get_default_dtype(), torch.float32))
