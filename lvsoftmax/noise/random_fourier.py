"""Draws in proportion to a Gaussian kernel of directions, estimated by random features."""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lvsoftmax.ops.categorical import FEWEST, block_sums, draw_by_blocks, prior
from lvsoftmax.ops.noise import Sample
from lvsoftmax.ops.numerics import upcast


class RandomFourierNoise(nn.Module):
    """Draws K words of its own for each token, with replacement, from ``q(w | h) ~ e^{b_w} k(h, w)``.

    ``k(h, w) = max(phi(h) . phi(w), e^{-2 nu})`` estimates ``exp(-nu |h - w|^2 / 2) = e^{-nu} exp(nu h . w)``, for
    vectors scaled to length one, by ``phi(u) = (cos(O u), sin(O u)) / sqrt(F)`` with F random directions ``O``, normal
    with variance ``nu`` (Rawat et al. 2019, Sampled Softmax with Random Fourier Features, section 3.2). Between vectors
    of length one the kernel is never below ``e^{-2 nu}``. Its estimate may be, and may be negative, where the paper
    counts on enough features; it is raised to that value, so that every word keeps some probability. The bias, which
    they do not have, enters as a factor, as it does in the softmax.

    Drawn in two steps: a block of ``sqrt(V) / 2`` words (at least 64), by ``phi(h) . sum e^b phi(w)`` over them, raised
    likewise, then a word of it. ``q`` is the product of the two probabilities; wherever nothing was raised it is the
    formula above. (They walk down a binary tree of such sums.) Cost per token: ``2 D F + 8 F sqrt(V)`` FLOPs and
    ``2 F sqrt(V)`` per block drawn, at most ``4 F V`` together.

    The features follow the table when the training loop calls ``refresh``: ``2 V D F`` FLOPs. In between ``q`` is that
    of the table as it was. Memory: ``2 F (V + 2 sqrt(V))`` numbers.

    Args:
        hidden_size: D.
        vocab_size: V.
        count: K.
        frequencies: F.
        sharpness: ``nu``.
    """

    distinct = False
    holds_targets = False

    frequency: Tensor
    feature: Tensor
    factor: Tensor
    block_feature: Tensor
    block_factor: Tensor

    def __init__(
        self, hidden_size: int, vocab_size: int, count: int, *, frequencies: int = 128, sharpness: float = 1.0
    ) -> None:
        super().__init__()
        self.count = count
        self.floor = math.exp(-2 * sharpness)
        self.block_size = max(math.ceil(math.sqrt(vocab_size) / 2), FEWEST)
        self.register_buffer("frequency", math.sqrt(sharpness) * torch.randn(frequencies, hidden_size))
        for name, value in self._follow(torch.zeros(vocab_size, hidden_size), None).items():
            self.register_buffer(name, value)

    def draw(self, hidden: Tensor, target: Tensor, previous: Tensor | None, generator: Generator) -> Sample:
        """Draw ``[tokens, K]`` words; ``log_expected`` is ``log(K q)``."""
        feature = self._features(hidden)

        def word_mass(token: Tensor, words: slice) -> Tensor:
            kernel = upcast(feature[token] @ self.feature[words].T).clamp_(min=self.floor)
            return kernel * self.factor[words]

        block_mass = torch.maximum(upcast(feature @ self.block_feature.T), self.floor * self.block_factor)
        drawn = draw_by_blocks(block_mass, word_mass, len(self.feature), self.block_size, target, self.count, generator)
        shift = math.log(self.count)
        return Sample(drawn.ids, drawn.log_probability + shift, drawn.target_log_probability + shift)

    def observe(self, target: Tensor) -> None:
        """Nothing: the distribution follows the table."""

    def refresh(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take over the table."""
        for name, value in self._follow(weight, bias).items():
            getattr(self, name).copy_(value)

    def _features(self, vectors: Tensor) -> Tensor:
        dtype = self.frequency.dtype
        angle = upcast(F.linear(F.normalize(vectors.to(dtype), dim=1), self.frequency))
        return (torch.cat([angle.cos(), angle.sin()], 1) / math.sqrt(len(self.frequency))).to(dtype)

    def _follow(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        feature = self._features(weight)
        factor = prior(bias, len(weight), feature)
        return {
            "feature": feature,
            "factor": factor,
            "block_feature": block_sums(factor[:, None] * feature, self.block_size),
            "block_factor": block_sums(factor, self.block_size),
        }
