"""Draws by an inverted multi-index over the table."""

import math

import torch
from torch import Generator, Tensor, nn

from lvsoftmax.ops.categorical import prior
from lvsoftmax.ops.multi_index import MultiIndex, draw_by_cells, fit_codebook, multi_index
from lvsoftmax.ops.noise import Sample
from lvsoftmax.ops.numerics import upcast

ROUNDS = 3  # of k-means, each time the table is followed


class MidxNoise(nn.Module):
    """Draws K words of its own for each token, with replacement, from the softmax of quantised word vectors.

    ``q(w | h) ~ exp(b_w + h_1 . c_i(w) + h_2 . c_j(w))``: the vectors are cut in halves, of which each has a codebook
    of ``M = V^(1/3)`` codewords, found by k-means; ``i(w)`` and ``j(w)`` are the codewords nearest to the halves of
    ``w`` (Chen et al. 2022, Fast Variational AutoEncoder with Inverted Multi-Index for Collaborative Filtering). The
    words of a cell ``(i, j)`` have equal scores. The cell is drawn exactly, by its score and its mass, in one step
    where the paper has two, then a word of it in proportion to ``e^b``. This is the faster of their variants, in which
    the residual ``w - c`` plays no part: uniform in a cell without a bias, by popularity with one. (The exact variant
    scores the residuals of all words: it is the softmax, at its cost.) Every word keeps what its cell and its bias give
    it, however little.

    Cost per token: ``2 D M`` FLOPs, ``M^2 = V^(2/3)`` exponentials, a search per draw. The codebooks follow the table
    when the training loop calls ``refresh``: 3 rounds of k-means from where they were, ``8 V D M`` FLOPs. In
    between ``q`` is that of the table as it was. Memory: ``2 M D + 2 M^2 + 8 V`` numbers.

    Args:
        hidden_size: D.
        vocab_size: V.
        count: K.
    """

    distinct = False
    holds_targets = False

    first: Tensor
    second: Tensor
    cell: Tensor
    mass: Tensor
    order: Tensor
    reached: Tensor
    cell_mass: Tensor

    def __init__(self, hidden_size: int, vocab_size: int, count: int) -> None:
        super().__init__()
        self.count = count
        codewords = math.ceil(vocab_size ** (1 / 3))
        half = hidden_size // 2
        self.register_buffer("first", torch.zeros(codewords, half))
        self.register_buffer("second", torch.zeros(codewords, hidden_size - half))
        nowhere = torch.zeros(vocab_size, dtype=torch.long)
        index = multi_index(nowhere, nowhere, codewords, prior(None, vocab_size, self.first))
        for name, column in index._asdict().items():
            self.register_buffer(name, column)

    def draw(self, hidden: Tensor, target: Tensor, previous: Tensor | None, generator: Generator) -> Sample:
        """Draw ``[tokens, K]`` words; ``log_expected`` is ``log(K q)``."""
        index = MultiIndex(self.cell, self.mass, self.order, self.reached, self.cell_mass)
        first, second = self._halves(hidden.to(self.first.dtype))
        first, second = upcast(first @ self.first.T), upcast(second @ self.second.T)
        drawn = draw_by_cells(index, first, second, target, self.count, generator)
        shift = math.log(self.count)
        return Sample(drawn.ids, drawn.log_probability + shift, drawn.target_log_probability + shift)

    def observe(self, target: Tensor) -> None:
        """Nothing: the distribution follows the table."""

    def refresh(self, weight: Tensor, bias: Tensor | None) -> None:
        """Let the codebooks follow the table."""
        first, second = self._halves(weight.to(self.first.dtype))
        first, first_code = fit_codebook(first, self.first, ROUNDS)
        second, second_code = fit_codebook(second, self.second, ROUNDS)
        self.first.copy_(first)
        self.second.copy_(second)
        index = multi_index(first_code, second_code, len(first), prior(bias, len(weight), upcast(weight)))
        for name, column in index._asdict().items():
            getattr(self, name).copy_(column)

    def _halves(self, vectors: Tensor) -> tuple[Tensor, ...]:
        return vectors.split([self.first.shape[1], self.second.shape[1]], 1)
