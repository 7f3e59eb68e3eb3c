"""The spherical softmax: squares in the place of exponentials."""

from typing import Literal

from torch import Tensor

from lvsoftmax.layer import DenseOutputLayer
from lvsoftmax.ops.linear_cross_entropy import NORMALISED_BACKENDS
from lvsoftmax.ops.normalisers import Spherical


class SphericalSoftmax(DenseOutputLayer):
    """Squared scores over their sum: ``p(w | h) = (s_w^2 + epsilon) / sum_v (s_v^2 + epsilon)``.

    ``s_w = w_w . h + b_w``. Multiplying all scores changes only what epsilon adds, where a softmax does not notice an
    addition. The sign of a score does not matter, and at ``s = 0`` a word has no gradient. A wide range of
    probabilities takes a wide range of scores, the square root of it. In the paper the layer is ahead of the softmax
    with 10 classes, and well behind on Penn Treebank (perplexity 149 to 127).

    The table starts uniform in ``+-1/sqrt(D)``; the bias at the positive scores that give the unigram distribution,
    that of the rarest word being ``sqrt(epsilon)``, where ``log p`` is steepest.

    Cost per token: ``6 D V`` FLOPs for a training step, ``2 D V`` for evaluation, and no exponential or logarithm per
    word; memory of one block of scores, twice that in eager. Losses of this family can be had in ``O(D^2)`` by another
    algorithm (Vincent, de Brebisson & Bouthillier 2015), which is not what is done here.

    Reference: de Brebisson & Vincent 2016, An Exploration of Softmax Alternatives Belonging to the Spherical Loss
    Family, the section on the spherical softmax. Epsilon is a hyper-parameter there, without a value for all tasks;
    the default is ours. The paper has no bias at the unigram distribution.

    Args:
        hidden_size: D.
        counts: ``[vocab]`` training frequency of each word, non-increasing.
        bias: whether words have a bias b.
        epsilon: above zero. The slope of ``log p`` is at most ``1 / sqrt(epsilon)``.
        backend: what computes loss and gradients; ``auto`` takes the fastest that can run on the device.

    Raises:
        ValueError: ``epsilon`` is not a positive finite number; ``backend`` cannot run here.
    """

    backends = NORMALISED_BACKENDS

    def __init__(
        self,
        hidden_size: int,
        counts: Tensor,
        *,
        bias: bool = True,
        epsilon: float = 0.1,
        backend: Literal["auto", "eager", "cpp"] = "auto",
    ) -> None:
        super().__init__(hidden_size, counts, bias=bias, backend=backend, normaliser=Spherical(epsilon))
