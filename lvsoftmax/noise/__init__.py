"""Noise as a part of a layer: a module per distribution, tables in persistent buffers, draws on their device."""

from typing import Literal, Protocol, runtime_checkable

from torch import Generator, Tensor

from lvsoftmax.noise.distinct import DistinctNoise
from lvsoftmax.noise.independent import IndependentNoise
from lvsoftmax.ops.noise import FixedNoiseName, Sample

NoiseName = Literal["uniform", "log_uniform", "unigram"]


@runtime_checkable
class Noise(Protocol):
    """A distribution over words to draw from, which may depend on the context or follow the layer's table.

    A module that keeps what it draws from in persistent buffers. ``observe`` and ``refresh`` are the only methods that
    change them.
    """

    count: int
    """K, words per draw (per token where the draws are a token's own)."""

    def draw(self, hidden: Tensor, target: Tensor, previous: Tensor | None, generator: Generator) -> Sample:
        """Draw words: ``[K]`` shared by the tokens, or ``[tokens, K]``, with the log of their expected counts."""
        ...

    def observe(self, target: Tensor) -> None:
        """Take note of a stretch of coming training targets."""
        ...

    def refresh(self, weight: Tensor, bias: Tensor | None) -> None:
        """Follow the layer's table."""
        ...


def make_noise(
    noise: NoiseName,
    counts: Tensor,
    count: int,
    *,
    power: float = 1.0,
    replacement: bool = True,
    per_token: bool = False,
) -> Noise:
    """Build the noise of a name.

    Args:
        noise: the distribution's name.
        counts: ``[vocab]`` training frequency of each word.
        count: K, words per draw.
        power: exponent of the distribution's weights.
        replacement: whether a word may be drawn more than once.
        per_token: whether every token draws words of its own; otherwise all share them.

    Raises:
        ValueError: the noise cannot be had with these arguments.
    """
    return make_fixed_noise(noise, counts, count, power=power, replacement=replacement, per_token=per_token)


def make_fixed_noise(
    noise: FixedNoiseName,
    counts: Tensor,
    count: int,
    *,
    power: float = 1.0,
    replacement: bool = True,
    per_token: bool = False,
) -> IndependentNoise | DistinctNoise:
    """Build a noise that neither depends on the context nor changes, and so knows every word's ``log_expected``.

    The arguments and errors are those of ``make_noise``.
    """
    if replacement:
        return IndependentNoise(counts, noise, power, count, per_token=per_token)
    if per_token:
        raise ValueError("replacement=False: words of a token's own are drawn with replacement; set replacement=true")
    return DistinctNoise(counts, noise, power, count)
