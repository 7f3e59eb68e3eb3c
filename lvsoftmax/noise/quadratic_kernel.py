"""Draws in proportion to a quadratic function of the logit."""

import math

import torch
from torch import Generator, Tensor, nn

from lvsoftmax.ops.categorical import FEWEST, block_sums, draw_by_blocks, prior
from lvsoftmax.ops.noise import Sample
from lvsoftmax.ops.numerics import upcast
from lvsoftmax.ops.quadratic import block_statistics, sums_of_squares


class QuadraticKernelNoise(nn.Module):
    """Draws K words of its own for each token, with replacement, from ``q(w | h) ~ e^{b_w} (alpha <h, w>^2 + 1)``.

    The kernel is that of Blanc & Rendle 2018, Adaptive Sampled Softmax with Kernel Based Sampling, section 3.3, with
    their ``alpha = 100``. The bias enters as a factor, as it does in the softmax that ``q`` is to resemble; they have
    none. Every word keeps the probability that ``+ 1`` leaves it.

    They walk down a binary tree whose nodes know ``sum w w'`` of the words below, to leaves of about D words. Here all
    leaves, blocks of D words (at least 64), are scored by one matrix product, ``D V`` FLOPs per token, which is less
    than the walks cost from K = V / (2 D log2(V / D)) draws on (9 at V = 33,000, D = 256). The words of a leaf that is
    drawn cost ``2 D^2``, at most ``2 D V`` together. So a token's draws cost between a sixth of a full softmax's
    training step (K well below V / D) and half of it.

    The tree follows the table when the training loop calls ``refresh``: ``2 V D^2`` FLOPs, as much as the logits of D
    tokens. In between ``q`` is that of the table as it was: it is kept, so that probabilities are those drawn from.
    Memory: 1.5 times the table.

    Args:
        hidden_size: D.
        vocab_size: V.
        count: K.
        alpha: weight of the square.
    """

    distinct = False
    holds_targets = False

    weight: Tensor
    factor: Tensor
    statistic: Tensor

    def __init__(self, hidden_size: int, vocab_size: int, count: int, *, alpha: float = 100.0) -> None:
        super().__init__()
        self.count = count
        self.alpha = alpha
        self.block_size = max(hidden_size, FEWEST)
        self.register_buffer("weight", torch.zeros(vocab_size, hidden_size))
        self.register_buffer("factor", prior(None, vocab_size, self.weight))
        self.register_buffer("statistic", block_statistics(self.weight, self.factor, self.block_size))

    def draw(self, hidden: Tensor, target: Tensor, previous: Tensor | None, generator: Generator) -> Sample:
        """Draw ``[tokens, K]`` words; ``log_expected`` is ``log(K q)``."""
        hidden = hidden.to(self.weight.dtype)

        def word_mass(token: Tensor, words: slice) -> Tensor:
            score = upcast(hidden[token] @ self.weight[words].T)
            return self.factor[words] * (self.alpha * score.square() + 1)

        # A sum of squares can come out below zero by rounding only.
        square = upcast(sums_of_squares(hidden, self.statistic)).clamp(min=0)
        block_mass = self.alpha * square + block_sums(self.factor, self.block_size)
        drawn = draw_by_blocks(block_mass, word_mass, len(self.weight), self.block_size, target, self.count, generator)
        shift = math.log(self.count)
        return Sample(drawn.ids, drawn.log_probability + shift, drawn.target_log_probability + shift)

    def observe(self, target: Tensor) -> None:
        """Nothing: the distribution follows the table."""

    def refresh(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take over the table."""
        self.weight.copy_(weight)
        self.factor.copy_(prior(bias, len(weight), self.factor))
        self.statistic.copy_(block_statistics(self.weight, self.factor, self.block_size))
