"""Serve a vocabulary in any order with a layer that wants it ranked by frequency."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lvsoftmax.layer import OutputLayer, check_frequencies
from lvsoftmax.ops.inputs import look_up
from lvsoftmax.ops.noise import Draws


class Permuted(OutputLayer):
    """The wrapped layer under other word ids: ``p(id | h) = layer.p(order[id] | h)``.

    ``Vocabulary`` ranks its words; tokenisers of other origin do not. Ids are translated where they enter and leave,
    everything else is the layer's own. What was drawn travels from ``draw`` to ``forward`` untranslated.

    Cost: one look-up per id, and for ``log_prob`` one copy of ``[tokens, vocab]``.

    Args:
        layer: the layer, over frequency ranks.
        order: ``[vocab]`` the rank of every id, a tensor, array or list.

    Raises:
        ValueError: ``order`` is not a permutation of the layer's words.

    >>> from lvsoftmax.layers.full_softmax import FullSoftmax
    >>> counts = torch.tensor([2, 9, 4])
    >>> layer = Permuted.from_counts(lambda ranked: FullSoftmax(16, ranked), counts)
    >>> layer.order
    tensor([2, 0, 1])
    """

    order: Tensor

    def __init__(self, layer: OutputLayer, order: Int[Tensor, "vocab"] | Sequence[int]) -> None:
        # The wrapper has no use for frequencies, which the layer has seen in its own order.
        super().__init__(layer.hidden_size, torch.ones(layer.vocab_size))
        order = torch.as_tensor(order)
        if not torch.equal(order.sort().values, torch.arange(layer.vocab_size, device=order.device)):
            raise ValueError(f"order must hold every rank 0 ... {layer.vocab_size - 1} once; give the rank of every id")
        self.layer = layer
        self.full_support = layer.full_support
        self.register_buffer("order", order.long())

    @classmethod
    def from_counts(cls, factory: Callable[[Tensor], OutputLayer], counts: Tensor) -> "Permuted":
        """Build a layer for words in any order, and wrap it.

        Args:
            factory: builds the layer from the counts in falling order.
            counts: ``[vocab]`` training frequency of every id; of equal ones the first has the lower rank.

        Raises:
            ValueError: ``counts`` are no frequencies.
        """
        check_frequencies(counts)
        ids = counts.argsort(descending=True, stable=True)
        return cls(factory(counts[ids]), ids.argsort())

    def log_prob(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        """Return the layer's log-probabilities, by id."""
        return self.layer.log_prob(hidden)[:, self.order]

    def nll(self, hidden: Float[Tensor, "tokens hidden"], target: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
        """Return the layer's exact negative log-likelihood."""
        return self.layer.nll(hidden, look_up(self.order, target))

    def topk(
        self, hidden: Float[Tensor, "tokens hidden"], k: int
    ) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
        """Return the layer's ``k`` largest log-probabilities and their ids."""
        values, ranks = self.layer.topk(hidden, k)
        return values, self._ids()[ranks]

    def sample(self, hidden: Float[Tensor, "tokens hidden"], temperature: float = 1.0) -> Int[Tensor, "tokens"]:
        """Draw ids from the layer."""
        return self._ids()[self.layer.sample(hidden, temperature)]

    def log_partition(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens"] | None:
        """Return the layer's."""
        return self.layer.log_partition(hidden)

    def log_prob_and_partition(
        self, hidden: Float[Tensor, "tokens hidden"]
    ) -> tuple[Float[Tensor, "tokens vocab"], Float[Tensor, "tokens"] | None]:
        """Return the layer's, the former by id."""
        log_prob, log_partition = self.layer.log_prob_and_partition(hidden)
        return log_prob[:, self.order], log_partition

    def draw(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
    ) -> Draws:
        """Draw for the layer; words drawn are ranks."""
        return self.layer.draw(hidden, look_up(self.order, target), self._ranks(previous))

    def forward(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Draws = None,
    ) -> Float[Tensor, "tokens"]:
        """Return the layer's training objective."""
        return self.layer(hidden, look_up(self.order, target), self._ranks(previous), sample)

    def loss(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        weight: Float[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Draws = None,
    ) -> Float[Tensor, ""]:
        """Return the layer's weighted objective."""
        return self.layer.loss(hidden, look_up(self.order, target), weight, self._ranks(previous), sample)

    def embed(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... hidden"]:
        """Look ids up in the layer's table."""
        return self.layer.embed(look_up(self.order, ids))

    def observe(self, target: Int[Tensor, "..."]) -> None:
        """Announce coming targets to the layer."""
        self.layer.observe(look_up(self.order, target))

    def refresh(self) -> None:
        """Refresh the layer."""
        self.layer.refresh()

    def resolved(self) -> dict[str, Any]:
        """Return the layer's."""
        return self.layer.resolved()

    def diagnostics(self) -> dict[str, float]:
        """Return the layer's."""
        return self.layer.diagnostics()

    def chosen_backend(self, device: torch.device) -> str:
        """Return the layer's."""
        return self.layer.chosen_backend(device)

    def generator(self, device: torch.device) -> torch.Generator:
        """Return the layer's random stream; the wrapper has none."""
        return self.layer.generator(device)

    def generator_state(self) -> dict[str, Tensor]:
        """Return the layer's."""
        return self.layer.generator_state()

    def load_generator_state(self, state: dict[str, Tensor]) -> None:
        """Continue the layer's random streams."""
        self.layer.load_generator_state(state)

    def _ranks(self, ids: Tensor | None) -> Tensor | None:
        return None if ids is None else look_up(self.order, ids)

    def _ids(self) -> Tensor:
        """The id of every rank."""
        return torch.empty_like(self.order).scatter_(
            0, self.order, torch.arange(len(self.order), device=self.order.device)
        )
