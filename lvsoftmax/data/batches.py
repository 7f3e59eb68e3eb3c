"""Cuts a text into batches of contiguous streams, for training with carried recurrent state."""

from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor


class Batch(NamedTuple):
    """One step of truncated back-propagation through time: ``size`` streams, ``length`` words of each."""

    input: Int[Tensor, "size length"]
    """The word before each target."""
    target: Int[Tensor, "size length"]
    """The words to predict."""
    weight: Float[Tensor, "size length"] | None
    """1 for a word of the text, 0 for padding; None where there is no padding."""


@final
class ContiguousBatches:
    """A sequence of batches whose rows are streams: row b of batch i + 1 continues row b of batch i.

    The text of n tokens is cut into ``size`` rows of equal length. The input of a token is the word before it in the
    text, also where a row begins; before the first token of all it is ``start``.

    Args:
        ids: ``[tokens]`` the encoded text.
        size: rows.
        length: words of a row in one batch.
        start: the word before the text, usually ``<eos>``.
        complete: whether every token is predicted exactly once, with padding of weight and target 0 (evaluation), or
            the tail that does not fill the last batch is dropped (training).

    Raises:
        ValueError: a size below 1, or a text that does not fill one batch.
    """

    def __init__(self, ids: Int32[np.ndarray, "tokens"], size: int, length: int, *, start: int, complete: bool) -> None:
        if size < 1 or length < 1:
            raise ValueError(f"batch.size={size} and batch.length={length}: both must be at least 1")
        self.ids, self.size, self.length, self.start, self.complete = ids, size, length, start, complete
        self.row_tokens = -(-len(ids) // size) if complete else len(ids) // size
        self.steps = -(-self.row_tokens // length) if complete else self.row_tokens // length
        if not self.steps:
            raise ValueError(
                f"a text of {len(ids)} tokens does not fill one batch of batch.size={size} x batch.length={length}; "
                "lower them or give more text"
            )

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < self.steps:
            raise IndexError(f"batch {step} of {self.steps}")
        column = np.arange(step * self.length, (step + 1) * self.length)
        position = np.arange(self.size)[:, None] * self.row_tokens + column
        real = (column < self.row_tokens) & (position < len(self.ids))
        position[~real] = 0
        target = np.where(real, self.ids[position], 0)
        previous = np.where(position > 0, self.ids[position - 1], self.start)
        return Batch(
            torch.from_numpy(previous).long(),
            torch.from_numpy(target).long(),
            torch.from_numpy(real).float() if self.complete else None,
        )
