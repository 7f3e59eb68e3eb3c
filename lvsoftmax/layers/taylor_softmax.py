"""The Taylor softmax: a polynomial in the place of the exponential."""

from typing import Literal

from torch import Tensor

from lvsoftmax.layer import DenseOutputLayer
from lvsoftmax.ops.linear_cross_entropy import NORMALISED_BACKENDS
from lvsoftmax.ops.normalisers import Taylor


class TaylorSoftmax(DenseOutputLayer):
    """``p(w | h) = f(s_w) / sum_v f(s_v)`` with ``f(s) = 1 + s + s^2 / 2``, ``s_w = w_w . h + b_w``.

    f is the exponential's Taylor polynomial about zero. Being ``((s + 1)^2 + 1) / 2`` it is positive everywhere,
    without an epsilon, and the layer is a spherical softmax of ``s + 1`` at ``epsilon = 1``: f falls up to ``s = -1``
    and rises from there; far out it grows as a square, so that a wide range of probabilities takes a wide range of
    scores. In the paper the layer is ahead of the softmax with 10 classes, and well behind on Penn Treebank (perplexity
    147 to 127).

    The table starts uniform in ``+-1/sqrt(D)``; the bias at the scores that give the unigram distribution, that of the
    rarest word being 0, where ``log p`` is steepest.

    Cost per token: ``6 D V`` FLOPs for a training step, ``2 D V`` for evaluation, and no exponential or logarithm per
    word; memory of one block of scores, twice that in eager. Losses of this family can be had in ``O(D^2)`` by another
    algorithm (Vincent, de Brebisson & Bouthillier 2015), which is not what is done here.

    Reference: de Brebisson & Vincent 2016, An Exploration of Softmax Alternatives Belonging to the Spherical Loss
    Family, the section on the Taylor softmax. The paper has no bias at the unigram distribution.

    Args:
        hidden_size: D.
        counts: ``[vocab]`` training frequency of each word, non-increasing.
        bias: whether words have a bias b.
        backend: what computes loss and gradients; ``auto`` takes the fastest that can run on the device.

    Raises:
        ValueError: ``backend`` cannot run here.
    """

    backends = NORMALISED_BACKENDS

    def __init__(
        self,
        hidden_size: int,
        counts: Tensor,
        *,
        bias: bool = True,
        backend: Literal["auto", "eager", "cpp"] = "auto",
    ) -> None:
        super().__init__(hidden_size, counts, bias=bias, backend=backend, normaliser=Taylor())
