"""The laws: promises that hold for every output layer and every option. None of them knows a layer's name.

Those of gradients are in ``test_layers_gradients.py``, those of extreme inputs and precisions in
``test_layers_extremes.py``, that of learning in ``test_learning.py``.

A layer without full support (probabilities may be exactly zero) obeys those laws that infinity does not break, forms of
its own of the others, and some more.
"""

import copy
import functools

import numpy as np
import oracles
import pytest
import torch
from cases import (
    CASES,
    COUNTS,
    HIDDEN,
    Batch,
    assert_close,
    dense,
    for_every_case,
    for_every_case_of_partial_support,
    for_every_vocabulary,
    gradients,
    randomise,
)
from torch.utils.checkpoint import checkpoint

from lvsoftmax.layer import OutputLayer, unigram_log_prob

# -- the distribution -------------------------------------------------------------------------------------------------


@for_every_vocabulary
@for_every_case
def test_log_prob_is_normalised(case, counts):
    layer = randomise(case.build(counts=counts).double())
    log_prob = layer.log_prob(Batch.of(layer, scale=3.0).hidden)
    assert log_prob.shape == (7, len(counts))
    assert_close(log_prob.logsumexp(1), torch.zeros(7, dtype=torch.float64), 1e-12)


@for_every_case
def test_log_prob_equals_its_oracle(case):
    oracle = getattr(oracles, case.name, None)
    assert oracle is not None, f"tests/oracles.py has no oracle: write {case.name}(layer, hidden) -> [N, V] in it"
    layer = randomise(case.build().double())
    hidden = Batch.of(layer).hidden.detach()
    expected = oracle(layer, hidden.numpy())
    np.testing.assert_allclose(layer.log_prob(hidden).detach().numpy(), expected, rtol=1e-10, atol=1e-10)


@for_every_vocabulary
@for_every_case
def test_nll_is_minus_log_prob_of_the_target(case, counts):
    layer = randomise(case.build(counts=counts, **dense(case)).double())
    batch = Batch.of(layer)
    actual = layer.nll(batch.hidden, batch.target)
    expected = -layer.log_prob(batch.hidden).gather(1, batch.target[:, None]).squeeze(1)
    assert_close(actual, expected, 1e-10)
    assert_close(
        gradients(actual, batch.upstream, layer, batch.hidden),
        gradients(expected, batch.upstream, layer, batch.hidden),
        1e-10,
    )


@for_every_case
def test_loss_is_the_weighted_sum_of_forward(case):
    layer = randomise(case.build(**dense(case)).double())
    batch = Batch.of(layer)
    sample = batch.draw(layer)
    weight = batch.upstream.clone().requires_grad_()
    arguments = (batch.hidden, batch.target, weight, batch.previous, sample)
    actual, expected = layer.loss(*arguments), OutputLayer.loss(layer, *arguments)
    assert actual.shape == ()
    assert_close(actual, expected, 1e-10)
    upstream = torch.tensor(-1.7, dtype=torch.float64)
    assert_close(
        gradients(actual, upstream, layer, batch.hidden, weight),
        gradients(expected, upstream, layer, batch.hidden, weight),
        1e-10,
    )


@for_every_case
def test_loss_without_gradients_is_the_same(case):
    layer = randomise(case.build())
    batch = Batch.of(layer, dtype=torch.float32)
    arguments = (batch.hidden, batch.target, batch.upstream, batch.previous, batch.draw(layer))
    expected = layer.loss(*arguments).detach()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert_close(layer.loss(*arguments).clone(), expected, 1e-5)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float64])
@for_every_case
def test_weights_of_any_type_are_the_numbers_they_are(case, dtype):
    layer = randomise(case.build(**dense(case)))
    batch = Batch.of(layer, dtype=torch.float32)
    sample, results = batch.draw(layer), []
    weight = torch.tensor([1, 0, 1, 1, 0, 0, 1])
    for each in (weight.float(), weight.to(dtype)):
        loss = layer.loss(batch.hidden, batch.target, each, batch.previous, sample)
        results.append((loss.float(), gradients(loss, torch.ones_like(loss), layer, batch.hidden)))
    assert_close(*results, 1e-5)


@pytest.mark.parametrize("k", [1, 5])
@for_every_case
def test_topk_are_the_largest_of_log_prob(case, k):
    layer = randomise(case.build().double())
    hidden = Batch.of(layer).hidden.detach()
    values, ids = layer.topk(hidden, k)
    log_prob = layer.log_prob(hidden)
    assert_close(values, log_prob.sort(1, descending=True).values[:, :k], 1e-10)
    assert_close(log_prob.gather(1, ids), values, 1e-10)


@for_every_case
def test_log_prob_and_partition_are_what_they_are_alone(case):
    layer = randomise(case.build().double())
    hidden = Batch.of(layer).hidden.detach()
    log_prob, log_partition = layer.log_prob_and_partition(hidden)
    assert_close(log_prob, layer.log_prob(hidden), 1e-12)
    assert_close(log_partition, layer.log_partition(hidden), 1e-10)


@for_every_case
def test_nll_of_a_row_does_not_depend_on_the_other_rows(case):
    layer = randomise(case.build().double())
    batch = Batch.of(layer, tokens=12)
    hidden, target = batch.hidden.detach(), batch.target
    together = layer.nll(hidden, target)
    alone = torch.cat([layer.nll(hidden[i : i + 1], target[i : i + 1]) for i in range(len(target))])
    assert_close(together, alone, 1e-10)
    assert_close(layer.nll(hidden.flip(0), target.flip(0)).flip(0), alone, 1e-10)


@for_every_case
def test_state_dict_defines_the_distribution(case):
    saved, other = randomise(case.build(seed=0)), case.build(seed=1)
    batch = Batch.of(saved, dtype=torch.float32)
    saved.refresh()
    saved.observe(batch.previous)  # other words than those of the draws below
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other.log_prob(batch.hidden), saved.log_prob(batch.hidden))
    other.load_generator_state(saved.generator_state() or {"cpu": saved.generator(torch.device("cpu")).get_state()})
    for first, second in zip(batch.draw(saved) or (), batch.draw(other) or (), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@for_every_case
def test_samples_follow_log_prob(case, temperature):
    layer = randomise(case.build())
    hidden, size = Batch.of(layer, tokens=2, dtype=torch.float32).hidden.detach(), 20_000
    drawn = layer.sample(hidden.repeat_interleave(size, 0), temperature).view(2, size)
    frequency = torch.stack([row.bincount(minlength=layer.vocab_size) for row in drawn]) / size
    probability = (layer.log_prob(hidden) / temperature).softmax(1)
    standard_error = (probability * (1 - probability) / size).sqrt()
    assert ((frequency - probability).abs() <= 5 * standard_error + 3 / size).all()
    assert not frequency[probability == 0].any()


@for_every_case
def test_temperature_zero_takes_the_most_probable_word(case):
    layer = randomise(case.build())
    hidden = Batch.of(layer, dtype=torch.float32).hidden.detach()
    for temperature in (0.0, 1e-40):  # such that every logarithm divided by it is infinite
        assert torch.equal(layer.sample(hidden, temperature), layer.log_prob(hidden).argmax(1))


@for_every_case
def test_a_temperature_that_is_none_is_named(case):
    layer = case.build()
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"temperature={temperature}: must be"):
            layer.sample(torch.zeros(1, HIDDEN), temperature)


@pytest.mark.parametrize("case", [case for case in CASES if case.setting("bias") is not False], ids=str)
def test_an_untrained_layer_predicts_the_smoothed_unigram(case):
    layer = case.build()
    expected = unigram_log_prob(COUNTS).expand(3, -1)
    assert_close(layer.log_prob(torch.zeros(3, layer.hidden_size)), expected, 1e-4)


# -- randomness -------------------------------------------------------------------------------------------------------


@for_every_case
def test_equal_seeds_make_equal_layers(case):
    first, second = case.build(seed=3), case.build(seed=3)
    assert_close(first.state_dict(), second.state_dict(), 0.0)
    batch = Batch.of(first, dtype=torch.float32)
    for one, other in zip(batch.draw(first) or (), batch.draw(second) or (), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(first.sample(batch.hidden), second.sample(batch.hidden))


def test_random_streams_of_a_device_that_this_machine_lacks_are_kept_for_one_that_has_it():
    layer, state = CASES[0].build(), {"xla:7": torch.arange(16, dtype=torch.uint8)}
    layer.load_generator_state(state)
    copied = copy.deepcopy(layer)
    for each in (layer, copied):
        assert torch.equal(each.sample(torch.ones(3, HIDDEN)), CASES[0].build().sample(torch.ones(3, HIDDEN)))
        assert_close(each.generator_state()["xla:7"], state["xla:7"], 0)
        assert each.generator_state().keys() == {"xla:7", "cpu"}


@for_every_case
def test_a_checkpoint_from_before_the_first_draw_starts_the_stream_anew(case):
    layer = case.build()
    hidden = Batch.of(layer, dtype=torch.float32).hidden.detach()
    start = layer.generator_state()
    first = layer.sample(hidden)
    layer.load_generator_state(start)
    assert torch.equal(layer.sample(hidden), first)


@for_every_case
def test_use_leaves_the_global_random_stream_alone(case):
    layer = case.build()
    batch = Batch.of(layer, dtype=torch.float32)
    before = torch.get_rng_state()
    layer.observe(batch.target)
    layer.refresh()
    layer.loss(batch.hidden, batch.target, batch.upstream, batch.previous).backward()
    layer(batch.hidden, batch.target, batch.previous)
    layer.sample(batch.hidden)
    copy.deepcopy(layer)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("use_reentrant", [False, True])
@for_every_case
def test_a_checkpoint_computes_again_with_the_draws_given_and_refuses_to_draw(case, use_reentrant):
    """With others it would mix the gradients of the two."""
    layer = randomise(case.build(**dense(case)).double())
    batch = Batch.of(layer)
    sample = batch.draw(layer)

    def slopes(objective, again=False):
        layer.zero_grad()
        hidden = batch.hidden.detach().requires_grad_()
        value = checkpoint(objective, hidden, use_reentrant=use_reentrant) if again else objective(hidden)
        value.backward()
        return [None if x.grad is None else x.grad.clone() for x in (hidden, *layer.parameters())]

    def loss(hidden, sample=sample):
        return layer.loss(hidden.tanh(), batch.target, batch.upstream, batch.previous, sample)

    def forward(hidden, sample=sample):
        return (batch.upstream * layer(hidden.tanh(), batch.target, batch.previous, sample)).sum()

    for objective in (loss, forward):
        assert_close(slopes(objective, again=True), slopes(objective), 1e-10)
        if sample is not None:
            with pytest.raises(RuntimeError, match=r"draw outside of it, sample = layer.draw\("):
                slopes(functools.partial(objective, sample=None), again=True)


# -- probabilities of zero --------------------------------------------------------------------------------------------


@for_every_case_of_partial_support
def test_a_probability_of_zero_has_a_logarithm_without_gradient(case):
    """The other logarithms have the gradients that they had if it was not there."""
    layer = randomise(case.build(**dense(case)).double())
    batch = Batch.of(layer)
    log_prob = layer.log_prob(batch.hidden)
    outside = log_prob == -torch.inf
    assert outside.any(1).all() and not outside.all(1).any() and not log_prob.isnan().any()
    upstream = torch.randn(log_prob.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    actual = gradients(log_prob, upstream, layer, batch.hidden)
    assert all(gradient.isfinite().all() for gradient in actual.values())
    assert_close(gradients(log_prob, upstream.masked_fill(outside, 0), layer, batch.hidden), actual, 1e-12)
    assert not any(
        gradient.any() for gradient in gradients(log_prob[outside].sum(), None, layer, batch.hidden).values()
    )
    never = outside.double().argmax(1)
    nll = layer.nll(batch.hidden, never)
    assert (nll == torch.inf).all()
    assert all(not gradient.any() for gradient in gradients(nll, batch.upstream, layer, batch.hidden).values())


@for_every_vocabulary
@for_every_case_of_partial_support
def test_the_objective_is_finite_never_negative_and_zero_at_its_optimum_alone(case, counts):
    """Blondel, Martins & Niculae 2020, proposition 2: zero where the target has all of the probability."""
    layer = randomise(case.build(counts=counts, **dense(case)))
    batch = Batch.of(layer, tokens=40, dtype=torch.float32)
    value = layer(batch.hidden, batch.target, batch.previous)
    assert value.isfinite().all() and (value >= 0).all()
    assert torch.equal(value > 0, layer.nll(batch.hidden, batch.target) > 0)
    sure = (1e3 * batch.hidden).detach().requires_grad_()
    target = layer.log_prob(sure).argmax(1)
    certain = layer.nll(sure, target) == 0
    assert certain.any()
    value = layer(sure, target, batch.previous)
    assert not value[certain].any()
    loss = layer.loss(sure, target, certain.float(), batch.previous)
    for output, upstream in ((value, certain.float()), (loss, None)):
        assert not any(gradient.any() for gradient in gradients(output, upstream, layer, sure).values())


@for_every_case_of_partial_support
def test_the_objective_is_stationary_where_targets_follow_the_layers_own_distribution(case):
    """What ties ``forward`` to ``log_prob``: the optimum of the one, in expectation, is the other."""
    layer = randomise(case.build(**dense(case)).double())
    hidden = Batch.of(layer, tokens=3).hidden
    words = torch.arange(layer.vocab_size)
    for token in hidden.split(1):
        every = token.expand(layer.vocab_size, -1)
        p = layer.log_prob(token).squeeze(0).exp().detach()
        assert 0 < (p > 0).sum() < layer.vocab_size
        for value in ((p * layer(every, words, words)).sum(), layer.loss(every, words, p, words)):
            slopes = gradients(value, None, layer, hidden)
            assert_close(slopes, {name: torch.zeros_like(slope) for name, slope in slopes.items()}, 1e-10)
        elsewhere = gradients(layer.loss(every, words, p.roll(1), words), None, layer, hidden)
        assert all(slope.norm() > 1e-2 for slope in elsewhere.values())
