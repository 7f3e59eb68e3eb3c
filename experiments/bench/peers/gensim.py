"""gensim's skip-gram with hierarchical softmax, Mikolov et al. 2013: a Huffman tree over the same counts.

Its step is the whole of its training: predict one word from one vector and update both by gradient descent. Sentences
of words drawn independently, a window of one word, so that a word has two targets and a target one word to be predicted
from. Time counts per pair.
"""

from typing import final

import torch

from experiments.bench.cell import Batch, Cell, Unavailable, problem

VARIANTS = {"gensim, hierarchical softmax": {}}
PACKAGE = "gensim"
INSTALL = "pip install gensim"
EXACT = False

SENTENCES, WORDS = 20, 1000


def build(cell: Cell) -> "GensimInstance":
    """Build it."""
    if torch.device(cell.device).type != "cpu" or cell.precision != "fp32":
        raise Unavailable("runs on the CPU in fp32 only")
    import gensim.models

    counts = problem(cell).counts
    model = gensim.models.Word2Vec(
        vector_size=cell.hidden, sg=1, hs=1, negative=0, window=1, shrink_windows=False, min_count=0, sample=0,
        workers=cell.threads,
    )  # fmt: skip
    model.build_vocab_from_freq({str(word): count for word, count in enumerate(counts.tolist())})
    return GensimInstance(model, cell)


@final
class GensimInstance:
    """See the module."""

    counted = False

    def __init__(self, model, cell: Cell) -> None:
        draw = torch.rand(SENTENCES, WORDS, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        cumulative = problem(cell).counts.double().cumsum(0)
        ids = torch.searchsorted(cumulative, draw * cumulative[-1]).clamp_(max=cell.vocab - 1)
        self.model = model
        self.text = [[str(word) for word in sentence] for sentence in ids.tolist()]
        self.parameters = model.wv.vectors.size + model.syn1.size
        self.scale = cell.tokens / (SENTENCES * 2 * (WORDS - 1))
        self.modes = {"step": self._step}

    def _step(self, batch: Batch) -> None:
        self.model.train(self.text, total_examples=len(self.text), epochs=1)

    def forget(self, batch: Batch) -> None:
        """It has updated its vectors; nothing else is left behind."""

    def gradient_bytes(self, batch: Batch) -> int:
        """It has no gradients."""
        return 0
