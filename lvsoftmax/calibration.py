"""Calibration: how far a layer's probabilities can be trusted, and the temperature that mends it.

A model that is right about 70 % of the words to which it gives a probability of 0.7, and so on, is calibrated. Networks
tend to be too sure of themselves. ``p^(1 / T)``, normalised again, leaves the order of the words and is less sure for a
temperature T above 1; T is fitted on held-out text and measured on other text. Guo, Pleiss, Sun & Weinberger 2017, On
Calibration of Modern Neural Networks, sections 2 and 4.2.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lvsoftmax.layer import OutputLayer

_ENTRIES = 2**22  # of one [tokens, vocab] block: 16 MiB in float32, which stay in a cache and need no fresh memory
_FEWEST = 32  # tokens of a block, however large the vocabulary
_LIMIT = 100.0  # of the temperature, and of its inverse


def calibration_error(
    confidence: Float[np.ndarray, "tokens"], correct: Bool[np.ndarray, "tokens"], bins: int = 15
) -> float:
    """Return the expected calibration error of the most probable word.

    ``sum_m |B_m| / n * |acc(B_m) - conf(B_m)|`` where bin ``m`` of M holds the tokens whose highest probability lies in
    ``((m - 1) / M, m / M]``: Guo et al. 2017, equation 3.

    Args:
        confidence: probability of the most probable word.
        correct: whether that word is the target.
        bins: M.
    """
    bin_of = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    # |B_m| * (acc - conf) is the sum of the differences inside the bin.
    difference = np.bincount(bin_of, weights=correct.astype(np.float64) - confidence, minlength=bins)
    return float(np.abs(difference).sum() / len(confidence))


@torch.no_grad()
def fit_temperature(
    output: OutputLayer, hidden: Float[Tensor, "tokens hidden"], target: Int[Tensor, "tokens"]
) -> float:
    """Return the temperature T in [0.01, 100] at which ``softmax(log_prob / T)`` gives targets the highest likelihood.

    The mean negative log-likelihood is convex in ``1 / T``; Newton's method with a bracket finds its minimum. The first
    and second derivatives are ``E[log p] - log p(target)`` and ``Var[log p]`` under the tempered distribution. Targets
    of probability 0 have none at any T and are left out; where all are, T is 1.

    Cost: about three times that of ``log_prob`` of the tokens; memory of a block of them.

    Args:
        output: any layer.
        hidden: hidden vectors of held-out text.
        target: its words.
    """
    inverse, low, high = 1.0, 1 / _LIMIT, _LIMIT
    for _ in range(50):
        slope, curvature = _derivatives(output, hidden, target, inverse)
        if not abs(slope) > 0:  # nor where it is no number
            break
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        newton = inverse - slope / curvature if curvature > 0 else math.inf
        inside = low < newton < high
        before, inverse = inverse, newton if inside else math.sqrt(low * high)
        if abs(math.log(inverse / before)) < (1e-2 if inside else 1e-4):  # Newton's error is of the order of its square
            break
    return 1 / inverse


def log_power_sum(log_prob: Float[Tensor, "tokens vocab"], power: float) -> Float[Tensor, "tokens"]:
    """Return ``log(sum_w p_w^power)``, for ``power > 0``: what normalises ``p^power``."""
    # The softmax's own exponentials are several times faster than those of an exp.
    scaled = log_prob * power
    return scaled.amax(1) - torch.log_softmax(scaled, 1).amax(1)


def token_blocks(hidden: Tensor, target: Tensor, vocab_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut hidden vectors and targets into blocks of tokens small enough for ``[tokens, vocab]``."""
    size = max(_ENTRIES // vocab_size, _FEWEST)
    return zip(hidden.split(size), target.split(size), strict=True)


def _derivatives(output: OutputLayer, hidden: Tensor, target: Tensor, inverse: float) -> tuple[float, float]:
    """Return the sums of the first two derivatives of the tempered nll by ``1 / T``."""
    slope = curvature = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for hidden_block, target_block in token_blocks(hidden, target, output.vocab_size):
        log_prob = output.log_prob(hidden_block)
        own = log_prob.gather(1, target_block[:, None]).squeeze(1)
        log_prob.clamp_(min=-1e4)  # a weight of zero times minus infinity is no number
        p = torch.softmax(log_prob * inverse, 1)
        first = torch.linalg.vecdot(p, log_prob).double()
        second = torch.linalg.vecdot(p.mul_(log_prob), log_prob).double()
        has_any = own > -torch.inf
        slope = slope + (first - own)[has_any].sum()
        curvature = curvature + (second - first.square())[has_any].sum()
    return slope.item(), curvature.item()
