"""The laws at extremes: huge hidden vectors, no token, bfloat16, another default device."""

import copy
import math

import pytest
import torch
from cases import Batch, dense, for_every_case, for_every_vocabulary, gradients, randomise, zipf_counts


@for_every_vocabulary
@for_every_case
def test_everything_is_finite_at_huge_hidden_vectors(case, counts):
    """But for the logarithm of a probability of zero, where a layer has such."""
    layer = randomise(case.build(counts=counts))
    batch = Batch.of(layer, dtype=torch.float32, scale=1e4)
    for log_probability in (layer.log_prob(batch.hidden), -layer.nll(batch.hidden, batch.target)):
        assert log_probability.exp().isfinite().all()
        assert log_probability.isfinite().all() or not layer.full_support
    value = layer(batch.hidden, batch.target, batch.previous)
    loss = layer.loss(batch.hidden, batch.target, batch.upstream, batch.previous)
    assert value.isfinite().all() and loss.isfinite()
    for output, upstream in ((value, batch.upstream), (loss, torch.ones(()))):
        for name, gradient in gradients(output, upstream, layer, batch.hidden).items():
            assert gradient.isfinite().all(), name


@pytest.mark.parametrize("tokens", [0, 1])
@for_every_vocabulary
@for_every_case
def test_batches_of_no_and_one_token(case, counts, tokens):
    layer = case.build(counts=counts)
    batch = Batch.of(layer, tokens, dtype=torch.float32)
    assert layer.log_prob(batch.hidden).shape == (tokens, len(counts))
    assert layer.nll(batch.hidden, batch.target).shape == (tokens,)
    assert layer(batch.hidden, batch.target, batch.previous).shape == (tokens,)
    assert [x.shape for x in layer.topk(batch.hidden, 2)] == [(tokens, 2), (tokens, 2)]
    assert layer.sample(batch.hidden).shape == (tokens,)
    loss = layer.loss(batch.hidden, batch.target, torch.ones(tokens), batch.previous)
    loss.backward()
    assert loss.isfinite() and batch.hidden.grad is not None
    if tokens == 0:
        assert loss == 0
        assert all(p.grad is None or not p.grad.to_dense().any() for p in layer.parameters())


@for_every_case
def test_a_step_in_bfloat16_can_be_diagnosed_after_autocast(case):
    case.skip_if_interpreted()
    layer = randomise(case.build())
    batch = Batch.of(layer, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = batch.hidden.detach().bfloat16().requires_grad_()  # as a backbone gives it
        layer.loss(hidden, batch.target, batch.upstream, batch.previous).backward()
    assert all(map(math.isfinite, layer.diagnostics().values()))


@for_every_case
def test_another_default_device_changes_nothing(case):
    layer = randomise(case.build())
    batch = Batch.of(layer, dtype=torch.float32)
    with torch.device("meta"):
        value = layer.loss(batch.hidden, batch.target, batch.upstream, batch.previous)
        value.backward()
    assert value.isfinite() and batch.hidden.grad.isfinite().all()


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@for_every_case
def test_bfloat16_touches_products_only(case, hidden_dtype):
    """Under autocast results are float32, and not much further off than rounding the operands makes them.

    Where a log-probability can be infinite it is the probability that is compared.
    """
    case.skip_if_interpreted()
    layer = randomise(case.build(counts=zipf_counts(1000), **dense(case)), scale=0.1)
    batch = Batch.of(layer, tokens=64, dtype=torch.float32)
    sample = batch.draw(layer)

    def results(layer, hidden):
        hidden = hidden.detach().requires_grad_()
        weight = torch.full((64,), 1 / 64, dtype=layer.log_prob(hidden).dtype)
        loss = layer.loss(hidden, batch.target, weight, batch.previous, sample)
        log_prob, nll = layer.log_prob(hidden), layer.nll(hidden, batch.target)
        values = {
            "log_prob": log_prob if layer.full_support else log_prob.exp(),
            "nll": nll if layer.full_support else (-nll).exp(),
            "forward": layer(hidden, batch.target, batch.previous, sample),
            "loss": loss,
        }
        return values, gradients(loss, torch.ones_like(loss), layer, hidden)

    with torch.autocast("cpu", torch.bfloat16):
        values, slopes = results(layer, batch.hidden.to(hidden_dtype))
    true_values, true_slopes = results(copy.deepcopy(layer).double(), batch.hidden.double())
    rounded = copy.deepcopy(layer).double()
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.ndim > 1:  # biases are no operands of a product
                parameter.copy_(parameter.bfloat16())
    rounded_values, rounded_slopes = results(rounded, batch.hidden.bfloat16().double())
    for name, value in values.items():
        assert value.dtype == torch.float32, name
        error = (value - true_values[name]).abs().mean()
        # errors of single tokens cancel in the loss by luck, so it is held to those of its terms
        reference = "forward" if name == "loss" else name
        allowed = 2 * (rounded_values[reference] - true_values[reference]).abs().mean() + 1e-4
        if name == "log_prob":  # PyTorch's own linear layer rounds its result, bias included
            allowed += 2**-9 * true_values[name].abs().mean()
        assert error <= allowed, f"{name}: off by {error:.1e}, more than {allowed:.1e}"
    for name, slope in slopes.items():
        error, unavoidable = ((x - true_slopes[name]).norm() for x in (slope, rounded_slopes[name]))
        assert error <= 2 * unavoidable + 1e-2 * true_slopes[name].norm(), f"gradient of {name}: {error:.1e}"
