"""A permuted layer is the layer under other ids: every method against the layer itself, ids translated by hand."""

import copy
import functools
import inspect

import pytest
import torch
from cases import CASES, COUNTS, Batch, assert_close, randomise

import lvsoftmax.permuted
from lvsoftmax.layer import OutputLayer
from lvsoftmax.layers.full_softmax import FullSoftmax
from lvsoftmax.ops.noise import Sample
from lvsoftmax.permuted import Permuted

LAYERS = [case for case in CASES if not case.option]
for_every_layer = pytest.mark.parametrize("case", LAYERS, ids=str)


def wrap(layer: OutputLayer) -> tuple[Permuted, list[int]]:
    """The layer in a wrapper whose state and random streams are its own, and the rank of every id."""
    order = torch.randperm(layer.vocab_size, generator=torch.Generator().manual_seed(2))
    return Permuted(copy.deepcopy(layer), order), order.tolist()


def translate(ranks: torch.Tensor, order: list[int]) -> torch.Tensor:
    return torch.tensor([order.index(rank) for rank in ranks.flatten().tolist()]).view_as(ranks)


@for_every_layer
def test_every_method_speaks_ids(case):
    layer = randomise(case.build())
    permuted, order = wrap(layer)
    batch = Batch.of(layer, dtype=torch.float32)
    hidden, rank, previous = batch.hidden, batch.target, batch.previous
    ids, previous_ids = translate(rank, order), translate(previous, order)

    layer.observe(rank)
    permuted.observe(ids)
    layer.refresh()
    permuted.refresh()
    for one, other in zip(layer.buffers(), permuted.layer.buffers(), strict=True):
        assert torch.equal(one, other)

    assert torch.equal(permuted.log_prob(hidden)[:, translate(torch.arange(97), order)], layer.log_prob(hidden))
    assert torch.equal(permuted.nll(hidden, ids), layer.nll(hidden, rank))
    sample, permuted_sample = layer.draw(hidden, rank, previous), permuted.draw(hidden, ids, previous_ids)
    assert (sample is None) == (permuted_sample is None)
    for one, other in zip(sample or (), permuted_sample or (), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(permuted(hidden, ids, previous_ids, permuted_sample), layer(hidden, rank, previous, sample))
    assert torch.equal(
        permuted.loss(hidden, ids, batch.upstream, previous_ids, permuted_sample),
        layer.loss(hidden, rank, batch.upstream, previous, sample),
    )
    for actual, expected in zip(permuted.topk(hidden, 5), layer.topk(hidden, 5), strict=True):
        assert torch.equal(actual, expected if expected.is_floating_point() else translate(expected, order))
    for temperature in (0.0, 1.0):
        expected = translate(layer.sample(hidden, temperature), order)
        assert torch.equal(permuted.sample(hidden, temperature), expected)
    assert_close(permuted.log_partition(hidden), layer.log_partition(hidden), 0.0)
    assert permuted.diagnostics() == layer.diagnostics()
    assert permuted.chosen_backend(hidden.device) == layer.chosen_backend(hidden.device)
    assert permuted.full_support == layer.full_support
    assert permuted.generator_state().keys() == layer.generator_state().keys()
    try:
        table = layer.embed(rank[None])
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error)):
            permuted.embed(ids[None])
    else:
        assert torch.equal(permuted.embed(ids[None]), table)
        with pytest.raises(IndexError):
            permuted.embed(torch.tensor([-1]))


class Recorder(OutputLayer):
    """Shows which ids arrive."""

    observed = None

    def observe(self, target):
        self.observed = target

    def log_prob(self, hidden):
        return hidden.new_full((len(hidden), self.vocab_size), 1 / self.vocab_size).log()

    def draw(self, hidden, target, previous=None):
        return Sample(previous, previous.float(), target.float())

    def forward(self, hidden, target, previous=None, sample=None):
        return (100 * previous + target).float()


def test_words_that_only_some_layers_look_at_are_translated_too():
    permuted = Permuted(Recorder(2, torch.tensor([3, 2, 1])), torch.tensor([2, 0, 1]))
    hidden, target, previous = torch.zeros(3, 2), torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    expected = torch.tensor([2.0, 100.0, 201.0])
    assert torch.equal(permuted(hidden, target, previous), expected)
    assert permuted.loss(hidden, target, torch.ones(3), previous) == expected.sum()
    assert permuted.draw(hidden, target, previous).ids.tolist() == [0, 1, 2]
    permuted.observe(torch.tensor([[0, 1], [1, 2]]))
    assert permuted.layer.observed.tolist() == [[2, 0], [0, 1]]


def test_no_method_of_the_interface_is_forgotten():
    public = {name for name, _ in inspect.getmembers(OutputLayer, inspect.isfunction) if name in vars(OutputLayer)}
    assert {name for name in public if not name.startswith("_")} <= vars(Permuted).keys()


@for_every_layer
def test_gradients_reach_the_layer(case):
    layer = randomise(case.build())
    permuted, order = wrap(layer)
    batch = Batch.of(layer, dtype=torch.float32)
    sample = batch.draw(layer)
    layer.loss(batch.hidden, batch.target, batch.upstream, batch.previous, sample).backward()
    ids, previous = translate(batch.target, order), translate(batch.previous, order)
    permuted.loss(batch.hidden, ids, batch.upstream, previous, sample).backward()
    for one, other in zip(layer.parameters(), permuted.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is None:  # a band without a target
            continue
        assert one.grad.is_sparse == other.grad.is_sparse
        assert torch.equal(one.grad.to_dense(), other.grad.to_dense())


def test_from_counts_ranks_the_words():
    counts = torch.tensor([2, 9, 4, 0, 9])
    permuted = Permuted.from_counts(functools.partial(FullSoftmax, 16), counts)
    assert permuted.order.tolist() == [3, 0, 2, 4, 1]
    permuted.layer.weight.data.zero_()
    expected = (counts + 1) / (counts + 1).sum()
    assert_close(permuted.log_prob(torch.randn(1, 16)).exp(), expected[None], 1e-6)


def test_the_order_is_part_of_the_state():
    first, second = (
        Permuted(FullSoftmax(4, COUNTS), torch.randperm(97, generator=torch.Generator().manual_seed(i))) for i in (0, 1)
    )
    second.load_state_dict(first.state_dict())
    hidden = torch.randn(3, 4)
    assert torch.equal(second.log_prob(hidden), first.log_prob(hidden))
    assert torch.equal(second.topk(hidden, 9)[1], first.topk(hidden, 9)[1])


def test_random_streams_are_the_layers():
    layer = FullSoftmax(4, COUNTS)
    permuted = Permuted(layer, torch.arange(97))
    hidden = torch.randn(50, 4)
    assert permuted.generator(hidden.device) is layer.generator(hidden.device)
    permuted.sample(hidden)
    state = permuted.generator_state()
    expected = permuted.sample(hidden)
    permuted.load_generator_state(state)
    assert torch.equal(layer.sample(hidden), expected)


def test_the_order_may_be_a_list():
    layer = FullSoftmax(4, torch.tensor([9, 4, 2]))
    assert torch.equal(Permuted(layer, [2, 0, 1]).order, torch.tensor([2, 0, 1]))


@pytest.mark.parametrize("order", [[0, 1, 1], [0, 1, 3], [1, 2, 3], [0, 1], [0, 1, 2, 3]])
def test_what_is_no_permutation_is_refused(order):
    with pytest.raises(ValueError, match=r"order must hold every rank 0 \.\.\. 2 once"):
        Permuted(FullSoftmax(4, torch.tensor([3, 2, 1])), torch.tensor(order))


def test_the_example_in_the_docstring():
    import doctest

    failed, tried = doctest.testmod(lvsoftmax.permuted)
    assert tried == 4 and not failed


@pytest.mark.parametrize("counts", [[3, 1], torch.tensor([3.0, -1.0]), torch.tensor([[3, 1]])])
@pytest.mark.usefixtures("without_type_checks")
def test_what_are_no_counts_is_refused_before_they_are_sorted(counts):
    with pytest.raises(ValueError, match="counts"):
        Permuted.from_counts(functools.partial(FullSoftmax, 16), counts)
