"""Each layer's distribution written a second time: from the paper's formula, in NumPy, in float64.

The oracle of ``lvsoftmax/layers/x.py`` is ``x(layer, hidden: np.ndarray) -> np.ndarray``: log-probabilities
``[N, V]`` from the layer's parameters and buffers. It shares no code with the layer, may be slow and loop over words,
and follows the paper's equation rather than the implementation.
"""

import numpy as np


def array(tensor) -> np.ndarray:
    """A parameter or buffer as float64."""
    return tensor.detach().double().numpy()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def dense_logits(layer, hidden: np.ndarray) -> np.ndarray:
    """``w_v . h + b_v`` of every word."""
    bias = 0.0 if layer.bias is None else array(layer.bias)
    return hidden @ array(layer.weight).T + bias


def full_softmax(layer, hidden: np.ndarray) -> np.ndarray:
    """Bengio et al. 2003, equation 1, its logits divided by the temperature."""
    return log_softmax(dense_logits(layer, hidden) * array(layer.inverse_temperature))
