"""Draws without replacement from a fixed distribution."""

from torch import Generator, Tensor, nn

from lvsoftmax.ops import noise as ops
from lvsoftmax.ops.noise import FixedNoiseName, Sample


class DistinctNoise(nn.Module):
    """Draws K different words for all tokens, with exact inclusion probabilities; O(V), see :mod:`lvsoftmax.ops.noise`.

    Args:
        counts: ``[vocab]`` training frequency of each word.
        noise: the distribution's name.
        power: exponent of the distribution's weights.
        count: K, words per draw.

    Raises:
        ValueError: ``count`` exceeds the vocabulary.
    """

    distinct = True
    holds_targets = False

    mass: Tensor

    def __init__(self, counts: Tensor, noise: FixedNoiseName, power: float, count: int) -> None:
        super().__init__()
        self.count = count
        self.register_buffer("mass", ops.inclusion_mass(ops.noise_probability(counts, noise, power), count))

    def draw(self, hidden: Tensor, target: Tensor, previous: Tensor | None, generator: Generator) -> Sample:
        """Draw ``[K]`` different words; ``log_expected`` is the log inclusion probability."""
        ids = ops.draw_distinct(self.mass, self.count, generator)
        return Sample(ids, self.log_expected(ids), self.log_expected(target))

    def log_expected(self, words: Tensor) -> Tensor:
        """Return the log inclusion probability of these words."""
        return ops.log_inclusion_probability(self.mass, words)

    def observe(self, target: Tensor) -> None:
        """Nothing: the distribution is fixed."""

    def refresh(self, weight: Tensor, bias: Tensor | None) -> None:
        """Nothing: the distribution is fixed."""
