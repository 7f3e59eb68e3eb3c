"""Noise as a part of a layer: integer tables in persistent buffers, draws on the device they live on."""

from torch import Generator, Tensor, nn

from lvsoftmax.ops import noise as ops
from lvsoftmax.ops.noise import NoiseName, Sample


class IndependentNoise(nn.Module):
    """Draws with replacement from a fixed distribution, in O(K); see :mod:`lvsoftmax.ops.noise`.

    Args:
        counts: ``[vocab]`` training frequency of each word.
        noise: the distribution's name.
        power: exponent of the distribution's weights.
        count: K, words per draw.
    """

    mass: Tensor
    threshold: Tensor
    alias: Tensor

    def __init__(self, counts: Tensor, noise: NoiseName, power: float, count: int) -> None:
        super().__init__()
        self.count = count
        for name, column in ops.alias_table(ops.noise_probability(counts, noise, power))._asdict().items():
            self.register_buffer(name, column)

    def draw(self, target: Tensor, generator: Generator) -> Sample:
        """Draw K words for all tokens; ``log_expected`` is ``log(K q)``."""
        ids = ops.draw_independent(ops.AliasTable(self.mass, self.threshold, self.alias), self.count, generator)
        return Sample(ids, *(ops.log_expected_count(self.mass, words, self.count) for words in (ids, target)))


class DistinctNoise(nn.Module):
    """Draws without replacement, with exact inclusion probabilities, in O(V); see :mod:`lvsoftmax.ops.noise`.

    Args:
        counts: ``[vocab]`` training frequency of each word.
        noise: the distribution's name.
        power: exponent of the distribution's weights.
        count: K, words per draw.

    Raises:
        ValueError: ``count`` exceeds the vocabulary.
    """

    mass: Tensor

    def __init__(self, counts: Tensor, noise: NoiseName, power: float, count: int) -> None:
        super().__init__()
        self.count = count
        self.register_buffer("mass", ops.inclusion_mass(ops.noise_probability(counts, noise, power), count))

    def draw(self, target: Tensor, generator: Generator) -> Sample:
        """Draw K different words for all tokens; ``log_expected`` is the log inclusion probability."""
        ids = ops.draw_distinct(self.mass, self.count, generator)
        return Sample(ids, *(ops.log_inclusion_probability(self.mass, words) for words in (ids, target)))
