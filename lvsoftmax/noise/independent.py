"""Draws with replacement from a fixed distribution."""

from torch import Generator, Tensor, nn

from lvsoftmax.ops import noise as ops
from lvsoftmax.ops.noise import FixedNoiseName, Sample


class IndependentNoise(nn.Module):
    """Draws K words with replacement from a fixed distribution; O(1) each, see :mod:`lvsoftmax.ops.noise`.

    Args:
        counts: ``[vocab]`` training frequency of each word.
        noise: the distribution's name.
        power: exponent of the distribution's weights.
        count: K, words per draw.
        per_token: every token draws K words of its own; otherwise all tokens share K words.
    """

    distinct = False
    holds_targets = False

    mass: Tensor
    threshold: Tensor
    alias: Tensor

    def __init__(
        self, counts: Tensor, noise: FixedNoiseName, power: float, count: int, *, per_token: bool = False
    ) -> None:
        super().__init__()
        self.count = count
        self.per_token = per_token
        for name, column in ops.alias_table(ops.noise_probability(counts, noise, power))._asdict().items():
            self.register_buffer(name, column)

    def draw(self, hidden: Tensor, target: Tensor, previous: Tensor | None, generator: Generator) -> Sample:
        """Draw ``[K]`` words, or ``[tokens, K]``; ``log_expected`` is ``log(K q)``."""
        shape = (len(target), self.count) if self.per_token else (self.count,)
        ids = ops.draw_independent(ops.AliasTable(self.mass, self.threshold, self.alias), shape, generator)
        return Sample(ids, self.log_expected(ids), self.log_expected(target))

    def log_expected(self, words: Tensor) -> Tensor:
        """Return ``log(K q)`` of these words."""
        return ops.log_expected_count(self.mass, words, self.count)

    def observe(self, target: Tensor) -> None:
        """Nothing: the distribution is fixed."""

    def refresh(self, weight: Tensor, bias: Tensor | None) -> None:
        """Nothing: the distribution is fixed."""
