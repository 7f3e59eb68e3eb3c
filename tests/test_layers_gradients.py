"""The laws of gradients: those of the definition, for every token, as p goes to one, dense or row-sparse."""

import copy

import pytest
import torch
from cases import (
    Batch,
    assert_close,
    dense,
    for_every_case,
    for_every_case_of_full_support,
    for_every_sparse_case,
    gradients,
    randomise,
    zipf_counts,
)

from lvsoftmax import optim
from lvsoftmax.layer import OutputLayer


@for_every_case
def test_gradcheck_of_forward(case):
    case.skip_if_interpreted()
    layer = randomise(case.build(hidden_size=8, counts=zipf_counts(19), **dense(case)).double())
    batch = Batch.of(layer, tokens=3)
    sample = batch.draw(layer)
    names = [name for name, _ in layer.named_parameters()]

    def forward(hidden, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, given, (hidden, batch.target, batch.previous, sample))

    assert torch.autograd.gradcheck(forward, (batch.hidden, *layer.parameters()), fast_mode=False)


@for_every_case
def test_every_token_has_its_own_upstream(case):
    layer = randomise(case.build(**dense(case)).double())
    batch = Batch.of(layer)
    sample = batch.draw(layer)
    value = layer(batch.hidden, batch.target, batch.previous, sample)
    assert value.shape == (7,)
    one_by_one = [gradients(value, one, layer, batch.hidden) for one in torch.eye(7, dtype=torch.float64)]
    for token, gradient in enumerate(one_by_one):
        assert gradient["input 0"].any(1).nonzero().flatten().tolist() == [token]
    expected = {
        name: sum(factor * gradient[name] for factor, gradient in zip(batch.upstream, one_by_one, strict=True))
        for name in one_by_one[0]
    }
    assert_close(gradients(value, batch.upstream, layer, batch.hidden), expected, 1e-10)
    loss = layer.loss(batch.hidden, batch.target, batch.upstream, batch.previous, sample)
    assert_close(gradients(loss, torch.ones_like(loss), layer, batch.hidden), expected, 1e-10)


@for_every_case
def test_a_gradient_is_differentiated_again_or_refuses(case):
    """Never a second derivative that lacks what goes through the layer: hidden vectors have a history of their own."""
    case.skip_if_interpreted()
    layer = randomise(case.build(**dense(case)).double())
    batch = Batch.of(layer)
    sample, along = batch.draw(layer), torch.randn(batch.hidden.shape, dtype=torch.float64)

    def penalty(objective, before):
        value = objective(before.tanh())
        (slope,) = torch.autograd.grad(value, before, create_graph=True)
        return slope.square().sum()

    for objective in (
        lambda hidden: layer.loss(hidden, batch.target, batch.upstream, batch.previous, sample),
        lambda hidden: layer(hidden, batch.target, batch.previous, sample).sum(),
        lambda hidden: layer.nll(hidden, batch.target).sum(),
        lambda hidden: layer.log_prob(hidden)[:, 0].sum(),
    ):
        try:
            (slope,) = torch.autograd.grad(penalty(objective, batch.hidden), batch.hidden)
        except RuntimeError as error:
            assert str(error).startswith("create_graph=True: this operation can be differentiated once; leave it out")
            continue
        ahead, behind = (penalty(objective, batch.hidden + step * along) for step in (1e-5, -1e-5))
        assert_close((slope * along).sum(), (ahead - behind) / 2e-5, 1e-4)


@for_every_case_of_full_support
def test_gradients_stay_right_as_p_goes_to_one(case):
    """The gradient is about ``1 - p`` there: computed as that difference, float32 leaves no correct digit."""
    case.skip_if_interpreted()
    exact = randomise(case.build(**dense(case)).double())
    hidden, target = confident(exact, miss=1e-7)
    single = copy.deepcopy(exact).float()
    sample = exact.draw(hidden, target, target)
    weight = torch.linspace(0.5, 2, len(target), dtype=torch.float64)

    def found(layer, dtype):
        cast = None if sample is None else type(sample)(*(x.to(dtype) if x.is_floating_point() else x for x in sample))
        x = hidden.to(dtype).requires_grad_()
        by_token = layer(x, target, target, cast)
        in_sum = layer.loss(x, target, weight.to(dtype), target, cast)
        by_nll = layer.nll(x, target)
        upstream = weight.to(dtype)
        return [
            gradients(by_token, upstream, layer, x),
            gradients(in_sum, torch.ones_like(in_sum), layer, x),
            gradients(by_nll, upstream, layer, x),
        ]

    for actual, expected in zip(found(single, torch.float32), found(exact, torch.float64), strict=True):
        for name, truth in expected.items():
            error = (actual[name].double() - truth).norm()
            allowed = 1e-3 * truth.norm() + torch.finfo(torch.float32).tiny  # less than which is zero in float32
            assert error <= allowed, f"{name}: relative error {error / truth.norm():.1e}"


def confident(layer: OutputLayer, miss: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden vectors, and the words that get probability ``1 - miss`` from them: one direction each, scaled."""
    with torch.no_grad():
        direction = Batch.of(layer).hidden.detach()
        target = layer.log_prob(1e3 * direction).argmax(1)
        low, high = torch.zeros(len(target), dtype=torch.float64), torch.full((len(target),), 1e3, dtype=torch.float64)
        for _ in range(60):
            middle = (low + high) / 2
            missed = -torch.expm1(-layer.nll(middle[:, None] * direction, target))
            low, high = torch.where(missed > miss, middle, low), torch.where(missed > miss, high, middle)
        return high[:, None] * direction, target


@for_every_sparse_case
def test_sparse_gradients_equal_dense_ones(case):
    sparse, dense = (randomise(case.build(sparse=value)) for value in (True, False))
    batch = Batch.of(sparse, dtype=torch.float32)
    sample = batch.draw(sparse)
    for layer in (sparse, dense):
        layer.loss(batch.hidden, batch.target, batch.upstream, batch.previous, sample).backward()
    assert any(p.grad is not None and p.grad.is_sparse for p in sparse.parameters())
    for one, other in zip(sparse.parameters(), dense.parameters(), strict=True):
        assert_close(one.grad.to_dense(), other.grad, 1e-6)


@pytest.mark.parametrize("method", [optim.SGD, optim.Adagrad, optim.Adam])
@for_every_sparse_case
def test_a_sparse_step_equals_the_dense_one_on_touched_rows(case, method):
    sparse, dense = (randomise(case.build(sparse=value)) for value in (True, False))
    batch = Batch.of(sparse, dtype=torch.float32)
    sample = batch.draw(sparse)
    for layer in (sparse, dense):
        layer.loss(batch.hidden, batch.target, batch.upstream, batch.previous, sample).backward()
        method(layer.parameters(), lr=0.1).step()
    for one, other in zip(sparse.parameters(), dense.parameters(), strict=True):
        touched = other.grad.reshape(len(other), -1).any(1)
        assert_close(one[touched], other[touched], 1e-5)
