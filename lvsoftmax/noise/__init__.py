"""Noise as a part of a layer: a module per distribution, tables in persistent buffers, draws on their device."""

from typing import Literal, Protocol, get_args, runtime_checkable

from torch import Generator, Tensor

from lvsoftmax.noise.bigram import BigramNoise
from lvsoftmax.noise.distinct import DistinctNoise
from lvsoftmax.noise.in_batch import InBatchNoise
from lvsoftmax.noise.independent import IndependentNoise
from lvsoftmax.noise.midx import MidxNoise
from lvsoftmax.noise.quadratic_kernel import QuadraticKernelNoise
from lvsoftmax.noise.random_fourier import RandomFourierNoise
from lvsoftmax.ops.noise import FixedNoiseName, Sample, log_inclusion, sample_count

NoiseName = Literal[
    "uniform", "log_uniform", "unigram", "bigram", "in_batch", "quadratic_kernel", "random_fourier", "midx"
]
"""The first three are fixed and are drawn with or without replacement, the others with replacement only."""


SHARED, OWN = 0.05, 0.005
"""Shares of the vocabulary that are drawn, if nothing else is said, where tokens share the draws and where they do not.

A shared draw is a row of a matrix product. One of a token's own is read from the table, and written to its gradient,
for this token alone: ten times as slow, and it serves one token, so that fewer are worth their price.
"""


@runtime_checkable
class Noise(Protocol):
    """A distribution over words to draw from, which may depend on the context or follow the layer's table.

    A module that keeps what it draws from in persistent buffers. ``observe`` and ``refresh`` are the only methods that
    change them.
    """

    distinct: bool
    """Whether no word is drawn twice; the expected count of a word is then the probability that it is drawn."""

    holds_targets: bool
    """Whether the draws are the targets of the call; draw ``n`` is then token ``n``'s own, and no draw for it."""

    def draw(self, hidden: Tensor, target: Tensor, previous: Tensor | None, generator: Generator) -> Sample:
        """Draw words: ``[K]`` shared by the tokens, or ``[tokens, K]``, with the log of their expected counts."""
        ...

    def observe(self, target: Tensor) -> None:
        """Take note of a stretch of coming training targets."""
        ...

    def refresh(self, weight: Tensor, bias: Tensor | None) -> None:
        """Follow the layer's table."""
        ...


def number_of_samples(
    name: str,
    value: int | float | None,
    noise: NoiseName,
    vocab_size: int,
    *,
    per_token: bool = False,
    shared: float = SHARED,
    own: float = OWN,
) -> int:
    """Return how many words to draw.

    Args:
        name: of the option.
        value: of the option: a number of words, a share of the vocabulary, or None for one of the following.
        noise: the distribution's name.
        vocab_size: V.
        per_token: whether every token draws words of its own from a fixed distribution.
        shared: default share where the tokens of a call share the draws.
        own: default share where each token draws for itself, as from any distribution that depends on the context.

    Raises:
        ValueError: ``value`` is neither of these.
    """
    if value is None:
        shares = noise == "in_batch" or (noise in get_args(FixedNoiseName) and not per_token)
        value = shared if shares else own
    return sample_count(name, value, vocab_size)


def make_noise(
    noise: NoiseName,
    counts: Tensor,
    count: int,
    *,
    hidden_size: int = 1,
    power: float = 1.0,
    replacement: bool | None = True,
    per_token: bool = False,
    bigrams: Tensor | str | None = None,
) -> Noise:
    """Build the noise of a name.

    Args:
        noise: the distribution's name.
        counts: ``[vocab]`` training frequency of each word.
        count: K, words per draw; ``in_batch`` has as many as there are tokens.
        hidden_size: D, width of the table, for those distributions that follow it.
        power: exponent of the weights of a fixed distribution, for ``bigram`` of the unigram it backs off to.
        replacement: whether a word may be drawn more than once; None: not where that can be had.
        per_token: whether every token draws words of its own from a fixed distribution; otherwise all share them.
        bigrams: for ``bigram``, rows of previous word, word and count, or the path of an .npy file of them.

    Raises:
        ValueError: the noise cannot be had with these arguments.
    """
    if noise not in get_args(NoiseName):
        raise ValueError(f"noise={noise!r}: choose one of {', '.join(get_args(NoiseName))}")
    if noise == "uniform" or noise == "log_uniform" or noise == "unigram":
        replaced = bool(replacement)
        return make_fixed_noise(noise, counts, count, power=power, replacement=replaced, per_token=per_token)
    if replacement is False:
        raise ValueError(f"replacement=False: noise={noise} draws with replacement only; set replacement=null")
    if noise == "bigram":
        return BigramNoise(counts, bigrams, power, count)
    if power != 1:
        raise ValueError(f"power={power}: noise={noise} has no weights to raise to a power; set power=1")
    if noise == "in_batch":
        return InBatchNoise(counts)
    if noise == "quadratic_kernel":
        return QuadraticKernelNoise(hidden_size, len(counts), count)
    if noise == "random_fourier":
        return RandomFourierNoise(hidden_size, len(counts), count)
    return MidxNoise(hidden_size, len(counts), count)


def with_targets_included(sample: Sample, noise: Noise) -> Sample:
    """Return the sample with the log probability that a target is among the draws as its ``target_log_expected``.

    That is what a target is to be corrected by which is in the sum once, however often it was drawn: with replacement
    it may be expected more than once, and would lose its own share.
    """
    if noise.distinct:
        return sample
    draws = max(sample.ids.shape[-1] - noise.holds_targets, 1)
    return sample._replace(target_log_expected=log_inclusion(sample.target_log_expected, draws))


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
    kind = IndependentNoise if replacement else DistinctNoise
    return kind(counts, noise, power, count, per_token=per_token)
