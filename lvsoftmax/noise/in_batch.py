"""The other tokens' targets as draws."""

import math

from torch import Generator, Tensor, nn

from lvsoftmax.ops import streaming as ops
from lvsoftmax.ops.noise import Sample


class InBatchNoise(nn.Module):
    """The draws of a call are its own targets: no word is looked up that is not needed anyway.

    ``ids`` are the N targets of the call, shared by its tokens. Of these, position ``n`` is no draw for token ``n``
    but its target: layers leave it out (``holds_targets``), and the draws of a token are the N - 1 others, expected to
    hold word ``w`` ``(N - 1) q(w)`` times, where ``q`` is how often words are targets. Whether further hits, other
    tokens' targets that equal the own one, count, is the layer's convention, as with any other noise.

    The frequencies ``q`` follow the stream of targets through ``observe``, by the running mean of the distances between
    the occurrences of a word (Yi et al. 2019, Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
    Recommendations, algorithm 2): O(V + T log T) for a stretch of T targets. They start at the training counts, each
    raised by one, where Yi et al. start from nothing; and time is counted in words where they count batches, so
    that batches may differ in size.

    Args:
        counts: ``[vocab]`` training frequency of each word.
        rate: least share of a new distance in the mean: frequencies are those of about the last ``1 / rate``
            occurrences.
    """

    distinct = False
    holds_targets = True

    gap: Tensor
    last: Tensor
    weight: Tensor
    position: Tensor

    def __init__(self, counts: Tensor, *, rate: float = 0.01) -> None:
        super().__init__()
        self.rate = rate
        for name, column in ops.gaps_of_counts(counts)._asdict().items():
            self.register_buffer(name, column)

    def draw(self, hidden: Tensor, target: Tensor, previous: Tensor | None, generator: Generator) -> Sample:
        """Return the targets; ``log_expected`` is ``log((N - 1) q)``."""
        log_expected = ops.log_frequency(self.gap, target) + math.log(max(len(target) - 1, 1))
        return Sample(target, log_expected, log_expected)

    def observe(self, target: Tensor) -> None:
        """Let the frequencies follow a stretch of coming targets."""
        state = ops.StreamingGaps(self.gap, self.last, self.weight, self.position)
        for name, column in ops.observe_gaps(state, target.flatten(), self.rate)._asdict().items():
            getattr(self, name).copy_(column)

    def refresh(self, weight: Tensor, bias: Tensor | None) -> None:
        """Nothing: the frequencies are those of targets."""
