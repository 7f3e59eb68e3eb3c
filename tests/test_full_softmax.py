"""Facts about the exact softmax that the laws do not know: temperature, cap and what is refused."""

import math

import numpy as np
import oracles
import pytest
import torch
from cases import COUNTS, HIDDEN, Batch, assert_close, gradients, randomise

from lvsoftmax.layer import OutputLayer, unigram_log_prob
from lvsoftmax.layers.full_softmax import FullSoftmax

BACKENDS = ["eager", "cpp"]


def built(**options):
    try:
        return randomise(FullSoftmax(HIDDEN, COUNTS, **options).double())
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{"temperature": 3.0}, {"softcap": 2.0}, {"temperature": 0.5, "softcap": 5.0}], ids=str
)
def test_temperature_and_cap(options, backend):
    layer = built(backend=backend, **options)
    batch = Batch.of(layer)
    expected = oracles.full_softmax(layer, batch.hidden.detach().numpy())
    np.testing.assert_allclose(layer.log_prob(batch.hidden).detach().numpy(), expected, rtol=1e-10, atol=1e-10)
    slow = OutputLayer.nll(layer, batch.hidden, batch.target)
    fast = layer.nll(batch.hidden, batch.target)
    loss = layer.loss(batch.hidden, batch.target, batch.upstream)
    assert_close(fast, slow, 1e-10)
    expected = gradients(slow, batch.upstream, layer, batch.hidden)
    assert_close(gradients(fast, batch.upstream, layer, batch.hidden), expected, 1e-10)
    assert_close(gradients(loss, torch.ones_like(loss), layer, batch.hidden), expected, 1e-10)
    assert_close(layer.log_partition(batch.hidden), layer.logits(batch.hidden).logsumexp(1), 1e-10)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_at_any_temperature_an_untrained_layer_predicts_the_smoothed_unigram(temperature):
    log_prob = FullSoftmax(HIDDEN, COUNTS, temperature=temperature).log_prob(torch.zeros(1, HIDDEN))
    assert_close(log_prob[0], unigram_log_prob(COUNTS), 1e-4)


def test_a_cap_bounds_the_ratio_of_probabilities():
    layer = built(softcap=2.0)
    log_prob = layer.log_prob(Batch.of(layer, scale=100.0).hidden)
    spread = log_prob.amax(1) - log_prob.amin(1)
    assert (spread <= 4.0 + 1e-9).all() and spread.max() > 3.99


@pytest.mark.parametrize(
    "options",
    [{"softcap": 0.0}, {"softcap": -1.0}, {"softcap": math.inf}, {"temperature": 0.0}, {"temperature": math.nan}],
    ids=str,
)
def test_impossible_options_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"^{name}="):
        FullSoftmax(HIDDEN, COUNTS, **options)
