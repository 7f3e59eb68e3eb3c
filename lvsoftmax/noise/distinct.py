"""Draws without replacement from a fixed distribution."""

from typing import Any

from torch import Generator, Tensor, nn

from lvsoftmax.ops import noise as ops
from lvsoftmax.ops.noise import FixedNoiseName, Sample


class DistinctNoise(nn.Module):
    """Draws K different words with exact inclusion probabilities; O(log V) each, see :mod:`lvsoftmax.ops.noise`.

    Args:
        counts: ``[vocab]`` training frequency of each word.
        noise: the distribution's name.
        power: exponent of the distribution's weights.
        count: K, words per draw.
        per_token: every token draws K words of its own; otherwise all tokens share K words.

    Raises:
        ValueError: ``count`` exceeds the vocabulary.
    """

    distinct = True
    holds_targets = False

    mass: Tensor
    reached: Tensor

    def __init__(
        self, counts: Tensor, noise: FixedNoiseName, power: float, count: int, *, per_token: bool = False
    ) -> None:
        super().__init__()
        self.count = count
        self.per_token = per_token
        self.register_buffer("mass", ops.inclusion_mass(ops.noise_probability(counts, noise, power), count))
        self.register_buffer("reached", self.mass.cumsum(0))

    def draw(self, hidden: Tensor, target: Tensor, previous: Tensor | None, generator: Generator) -> Sample:
        """Draw ``[K]`` different words, or ``[tokens, K]``; ``log_expected`` is the log inclusion probability."""
        shape = (len(target), self.count) if self.per_token else (self.count,)
        ids = ops.draw_distinct(self.reached, shape, generator)
        return Sample(ids, self.log_expected(ids), self.log_expected(target))

    def log_expected(self, words: Tensor) -> Tensor:
        """Return the log inclusion probability of these words."""
        return ops.log_inclusion_probability(self.mass, words)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        mass = state_dict.get(f"{prefix}mass")
        saved = self.count if mass is None else int(mass.sum()) // ops.DRAW
        if saved != self.count:
            raise ValueError(
                f"{prefix.rstrip('.')} draws {self.count} words and was saved where it drew {saved}; build the layer "
                "with that many samples"
            )
        super()._load_from_state_dict(state_dict, prefix, *others)

    def observe(self, target: Tensor) -> None:
        """Nothing: the distribution is fixed."""

    def refresh(self, weight: Tensor, bias: Tensor | None) -> None:
        """Nothing: the distribution is fixed."""
