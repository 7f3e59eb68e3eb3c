"""The sigsoftmax: exponentials times sigmoids."""

from typing import Literal

from torch import Tensor

from lvsoftmax.layer import DenseOutputLayer
from lvsoftmax.ops.linear_cross_entropy import NORMALISED_BACKENDS
from lvsoftmax.ops.normalisers import Sigmoidal


class SigSoftmax(DenseOutputLayer):
    """``p(w | h) = f(s_w) / sum_v f(s_v)`` with ``f(s) = exp(s) sigmoid(s)``, ``s_w = w_w . h + b_w``.

    The logarithm of a softmax of D-dimensional scores lies in a space of D + 1 dimensions, however many words there
    are: the softmax bottleneck. Here ``log f`` is not linear in s, which lifts that bound without a parameter more. Far
    above zero the layer is a softmax of s, far below one of 2 s.

    The table starts uniform in ``+-1/sqrt(D)``; the bias at the scores that give the unigram distribution, 0 standing
    for a probability of 1 / V, so that they lie about the bend of ``log f``.

    Cost per token: ``6 D V`` FLOPs for a training step, ``2 D V`` for evaluation, and one exponential per word; memory
    of one block of scores, twice that in eager.

    Reference: Kanai, Fujiwara, Yamanaka & Adachi 2018, Sigsoftmax: Reanalysis of the Softmax Bottleneck, definition of
    sigsoftmax. The paper has no bias at the unigram distribution. Computed in log space.

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
        super().__init__(hidden_size, counts, bias=bias, backend=backend, normaliser=Sigmoidal())
