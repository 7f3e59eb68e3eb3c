"""What a training text says about its words: bigram counts, and word vectors made from them.

A layer whose configuration gives one of its fields the word ``text`` gets the statistic of that field's name, see
:data:`STATISTICS`.

Letters in shapes: V words, P distinct pairs of neighbours, C contexts.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int, Int64
from torch import Tensor

OVERSAMPLING = 10  # further columns of the random start, and rounds of power iteration: the values that Halko et al.
POWER_ROUNDS = 4  # 2011, section 1.6, call enough for spectra that fall slowly


def bigrams(ids: Int[np.ndarray, "tokens"], vocab_size: int) -> Int64[np.ndarray, "pairs 3"]:
    """Count the pairs of neighbouring words of a text.

    Args:
        ids: ``[tokens]`` word ids in ``[0, vocab_size)``.
        vocab_size: V.

    Returns:
        Rows of the word before, the word, and how often the one precedes the other, sorted by the two; only pairs that
        occur.
    """
    key = np.asarray(ids[:-1], np.int64) * vocab_size
    key += ids[1:]
    key, count = np.unique(key, return_counts=True)
    return np.stack([key // vocab_size, key % vocab_size, count], 1)


def word_vectors(
    table: Int64[np.ndarray, "pairs 3"], vocab_size: int, width: int = 50, contexts: int = 2000
) -> Float32[np.ndarray, "vocab width"]:
    """Return vectors that point the same way for words with the same neighbours.

    The contexts of a word are the words before it and, apart from them, the words after it, of each the most frequent
    ``contexts``. From their counts ``n`` comes the matrix

        X[w, c] = sqrt(n(w, c) / (n(w) n(c))),

    whose best approximation of rank ``width`` gives the vectors: its rows, in the coordinates of its singular vectors,
    scaled to unit length; zero for a word without such neighbours. Square-rooted counts in place of counts, divided by
    powers of the margins, are those of Stratos, Collins & Hsu 2015, Model-based Word Embeddings from Decompositions of
    Count Matrices, section 4. They divide by ``(n(w) n(c))^(1/4)`` and leave the singular values out, which gives the
    many directions that are noise the weight of the few that are not: trees over such vectors are clearly worse.

    The decomposition is a randomised one (Halko, Martinsson & Tropp 2011, Finding Structure with Randomness, algorithms
    4.4 and 5.1) from a fixed seed: the same table gives the same vectors.

    Args:
        table: of :func:`bigrams`.
        vocab_size: V; words are ranked by frequency.
        width: of the vectors, if there are as many contexts; further components are zero.
        contexts: how many of the most frequent words serve as contexts on either side.
    """
    before, word, count = torch.from_numpy(table).T
    contexts = min(contexts, vocab_size)
    left, right = before < contexts, word < contexts
    row = torch.cat([word[left], before[right]])
    column = torch.cat([before[left], contexts + word[right]])
    count = torch.cat([count[left], count[right]]).double()
    row_sum = count.new_zeros(vocab_size).index_add_(0, row, count)
    column_sum = count.new_zeros(2 * contexts).index_add_(0, column, count)
    value = (count / (row_sum[row] * column_sum[column])).sqrt().float()
    rank = min(width, 2 * contexts, vocab_size)
    vectors = torch.zeros(vocab_size, width, dtype=torch.float32)
    vectors[:, :rank] = _principal_components(row, column, value, (vocab_size, 2 * contexts), rank)
    vectors[row_sum == 0] = 0  # rounding errors would be given unit length
    return F.normalize(vectors, eps=torch.finfo(vectors.dtype).tiny).numpy()


STATISTICS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "bigrams": bigrams,
    "embeddings": lambda ids, vocab_size: word_vectors(bigrams(ids, vocab_size), vocab_size),
}
"""By the name of the field that asks for it: what computes a statistic of a text."""


def _principal_components(
    row: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int], rank: int
) -> Float32[Tensor, "rows rank"]:
    """Return the left singular vectors of a sparse matrix times its singular values, for the ``rank`` largest."""
    by_row = _sparse_product(row, column, value, shape[0])
    by_column = _sparse_product(column, row, value, shape[1])
    size, generator = (shape[1], min(rank + OVERSAMPLING, *shape)), torch.Generator().manual_seed(0)
    start = torch.randn(size, generator=generator, dtype=value.dtype)
    basis = torch.linalg.qr(by_row(start)).Q
    for _ in range(POWER_ROUNDS):
        basis = torch.linalg.qr(by_row(torch.linalg.qr(by_column(basis)).Q)).Q
    left, singular, _ = torch.linalg.svd(by_column(basis).T, full_matrices=False)
    return basis @ (left * singular)[:, :rank]


def _sparse_product(row: Tensor, column: Tensor, value: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """Return the function that multiplies a sparse matrix by a dense one.

    An embedding bag is that product: a bag is a row, its members' weights are the values.
    """
    order = row.argsort(stable=True)
    column, value = column[order], value[order]
    size = row.bincount(minlength=rows)
    start = size.cumsum(0) - size
    return lambda dense: F.embedding_bag(column, dense, start, mode="sum", per_sample_weights=value)
