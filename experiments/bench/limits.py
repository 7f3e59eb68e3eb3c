"""What a machine allows: the products of a dense layer's step alone, and a copy of memory."""

import dataclasses
import itertools
from typing import final

import torch

from experiments.bench.cell import Batch, Cell, dense_table, problem
from lvsoftmax.cost import seconds


@final
@dataclasses.dataclass(frozen=True)
class Products:
    """The three matrix products of a dense layer's step and nothing else, in the best of a few tilings.

    Results go to memory that is there already. The tiling is found by trial when an instance is built.
    """

    label = "three products"
    kind = "limit"

    def build(self, cell: Cell) -> "ProductsInstance":
        """Find the best tiling."""
        return ProductsInstance(cell)

    def check(self, cell: Cell) -> None:
        """There is nothing to get wrong."""


@final
class ProductsInstance:
    """See :class:`Products`."""

    parameters = 0
    counted = True
    scale = 1.0
    largest = 2**30
    """Bytes of a tile at most."""

    def __init__(self, cell: Cell) -> None:
        torch.set_num_threads(cell.threads)
        dtype = cell.hidden_dtype
        self.weight = dense_table(cell)[0].detach().to(dtype)
        self.grad_weight = torch.zeros_like(self.weight)
        self.grad_hidden = torch.zeros(cell.tokens, cell.hidden, dtype=dtype, device=cell.device)
        self.room = self.weight.new_zeros(0)
        batch = problem(cell).batches[0]
        tilings = [(tokens, cell.vocab) for tokens in (256, 512, 1024, cell.tokens) if tokens <= cell.tokens]
        tilings += [(cell.tokens, words) for words in (4096, 16384) if words < cell.vocab]
        best = float("inf")
        for tiling in dict.fromkeys(tilings):
            if tiling[0] * tiling[1] * dtype.itemsize > self.largest:
                continue
            self.room = self.weight.new_zeros(tiling[0] * tiling[1])
            spent = seconds(lambda tiling=tiling: self.run(batch, tiling), torch.device(cell.device))
            if spent < best:
                best, self.tiling = spent, tiling
        self.room = self.weight.new_zeros(self.tiling[0] * self.tiling[1])
        self.modes = {"train": lambda batch: self.run(batch, self.tiling)}

    def run(self, batch: Batch, tiling: tuple[int, int]) -> None:
        """Multiply tile by tile."""
        hidden = batch.hidden.detach()
        rows, words = tiling
        for row, word in itertools.product(range(0, len(hidden), rows), range(0, len(self.weight), words)):
            h, w = hidden[row : row + rows], self.weight[word : word + words]
            tile = self.room[: len(h) * len(w)].view(len(h), len(w))
            torch.mm(h, w.T, out=tile)
            grad_h, grad_w = self.grad_hidden[row : row + rows], self.grad_weight[word : word + words]
            torch.addmm(grad_h, tile, w, beta=float(word > 0), out=grad_h)
            torch.addmm(grad_w, tile.T, h, beta=float(row > 0), out=grad_w)

    def forget(self, batch: Batch) -> None:
        """Nothing is left behind."""

    def gradient_bytes(self, batch: Batch) -> int:
        """Nothing is left behind."""
        return 0


@final
@dataclasses.dataclass(frozen=True)
class Copy:
    """A copy of 256 MiB: what the memory allows."""

    label = "copy of 256 MiB"
    kind = "limit"
    bytes = 2**29
    """Read and written."""

    def build(self, cell: Cell) -> "CopyInstance":
        """Touch the memory."""
        return CopyInstance(cell, self.bytes // 2)

    def check(self, cell: Cell) -> None:
        """There is nothing to get wrong."""


@final
class CopyInstance:
    """See :class:`Copy`."""

    parameters = 0
    counted = True
    scale = 1.0

    def __init__(self, cell: Cell, size: int) -> None:
        source, target = (torch.ones(size // 4, device=cell.device) for _ in range(2))
        self.modes = {"train": lambda batch: target.copy_(source)}

    def forget(self, batch: Batch) -> None:
        """Nothing is left behind."""

    def gradient_bytes(self, batch: Batch) -> int:
        """Nothing is left behind."""
        return 0
