"""What the adaptive softmax promises beyond the laws: PyTorch's numbers, its bands, its cost, its input embedding."""

import itertools

import numpy as np
import pytest
import torch
from cases import COUNTS, LargestResult, assert_close, gradients, randomise, zipf_counts
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lvsoftmax.layers.adaptive_softmax import AdaptiveSoftmax
from lvsoftmax.layers.full_softmax import FullSoftmax
from lvsoftmax.ops.linear_cross_entropy.cost_model import CostModel
from lvsoftmax.permuted import Permuted

N, D = 40, 16
COEFFICIENTS = np.array([2.2e-11, 8.4e-10, 5.9e-9, 4.0e-10, 1.2e-8, 2e-6])
"""Of a processor, but for the cost of a call, which would spare a small vocabulary its tails."""


def of_torch(**options):
    return nn.AdaptiveLogSoftmaxWithLoss(64, 97, **({"cutoffs": [5, 20, 60]} | options))


# -- PyTorch's module -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [{}, {"head_bias": True}, {"div_value": 1}, {"div_value": 2.5}, {"cutoffs": [1]}, {"cutoffs": [3, 96]}],
    ids=str,
)
def test_it_agrees_with_pytorch(options, dtype):
    module = of_torch(**options).to(dtype)
    layer = AdaptiveSoftmax.from_torch(module)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    hidden, target = torch.randn(N, 64, dtype=dtype, requires_grad=True), torch.randint(97, (N,))
    upstream = torch.randn(N, dtype=dtype)
    theirs = module(hidden, target)
    assert_close(layer(hidden, target), -theirs.output, tolerance)
    assert_close(layer.loss(hidden, target, torch.full((N,), 1 / N, dtype=dtype)), theirs.loss, tolerance)
    assert_close(layer.log_prob(hidden), module.log_prob(hidden), tolerance)
    assert torch.equal(layer.topk(hidden, 1)[1].squeeze(1), module.predict(hidden))
    expected = torch.autograd.grad(-theirs.output, [hidden, *module.parameters()], upstream)
    found = gradients(layer(hidden, target), upstream, layer, hidden)
    found_in_sum = gradients(layer.loss(hidden, target, upstream), torch.ones((), dtype=dtype), layer, hidden)
    for actual in (found, found_in_sum):
        names = ["input 0", "head_weight"] + ["head_bias"] * (layer.head_bias is not None)
        names += [f"{table}.{k}" for k in range(layer.tails) for table in ("projections", "tail_weights")]
        assert set(names) == set(actual)
        for name, gradient in zip(names, expected, strict=True):
            assert_close(actual[name], gradient, 3 * tolerance)


@pytest.mark.parametrize("head_bias", [False, True])
def test_weights_go_to_pytorch_and_back(head_bias):
    module = of_torch(head_bias=head_bias)
    layer = AdaptiveSoftmax.from_torch(module)
    again = layer.to_torch()
    assert_close(again.state_dict(), module.state_dict(), 0.0)
    before = layer.head_weight.clone()
    with torch.no_grad():
        module.head.weight.zero_()
        again.head.weight.zero_()
    assert torch.equal(layer.head_weight, before)


def test_biases_in_tails_do_not_go_to_pytorch():
    with pytest.raises(ValueError, match="bias=True: the tails have biases and PyTorch's have not"):
        AdaptiveSoftmax(D, COUNTS).to_torch()
    with pytest.raises(ValueError, match="cutoffs leave no tail"):
        AdaptiveSoftmax(D, COUNTS, cutoffs=[], bias=False).to_torch()
    module = randomise(AdaptiveSoftmax(D, COUNTS, bias=False)).to_torch()
    assert module.cutoffs == [2, 19, 97] and not module.head_bias


def test_pytorchs_tails_without_width_are_refused():
    with pytest.warns(UserWarning, match="zero-element"):
        module = nn.AdaptiveLogSoftmaxWithLoss(16, 97, [5, 20, 60])
    with pytest.raises(ValueError, match="div_value=4.0: a tail of PyTorch's module has width 0"):
        AdaptiveSoftmax.from_torch(module)


# -- bands ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "cutoffs", "of", "bounds"),
    [
        (97, (0.02, 0.2), "vocabulary", [0, 2, 19, 97]),
        (1000, (0.02, 0.2), "vocabulary", [0, 20, 200, 1000]),
        (1000, (5, 20, 100), "vocabulary", [0, 5, 20, 100, 1000]),
        (2, (0.02, 0.2), "vocabulary", [0, 1, 2]),
        (2, (0.9, 0.99), "vocabulary", [0, 1, 2]),
        (5, (0.41, 0.42, 0.43), "vocabulary", [0, 2, 5]),
        (100, (), "vocabulary", [0, 100]),
    ],
)
def test_bands_of_ranks_and_shares(size, cutoffs, of, bounds):
    layer = AdaptiveSoftmax(D, zipf_counts(size), cutoffs=cutoffs, cutoffs_of=of)
    assert layer.bounds == bounds
    assert len(layer.head_weight) == bounds[1] + len(bounds) - 2
    assert [len(weight) for weight in layer.tail_weights] == [
        b - a for a, b in zip(bounds[1:], bounds[2:], strict=False)
    ]


def test_bands_of_mass():
    counts = zipf_counts(1000)
    layer = AdaptiveSoftmax(D, counts, cutoffs=(0.5, 0.8), cutoffs_of="mass")
    _, first, second, _ = layer.bounds
    reached = counts.cumsum(0) / counts.sum()
    assert reached[first - 2] < 0.5 <= reached[first - 1]
    assert reached[second - 2] < 0.8 <= reached[second - 1]


def test_each_tail_is_narrower_by_div_value_and_at_least_one_wide():
    layer = AdaptiveSoftmax(40, COUNTS, cutoffs=[5, 10, 20, 30], div_value=3.0)
    assert [tuple(p.shape) for p in layer.projections] == [(13, 40), (4, 40), (1, 40), (1, 40)]
    assert [tuple(w.shape) for w in layer.tail_weights] == [(5, 13), (10, 4), (10, 1), (67, 1)]
    assert {len(p) for p in AdaptiveSoftmax(40, COUNTS, div_value=1.0).projections} == {40}


def test_equal_costs_give_the_same_cutoffs_and_resolved_builds_the_same_layer(monkeypatch):
    monkeypatch.setattr("lvsoftmax.layers.adaptive_softmax.cost_model", lambda *_: CostModel(COEFFICIENTS))
    counts = zipf_counts(20_000)
    layer = AdaptiveSoftmax(64, counts, cutoffs="auto")
    assert layer.bounds == AdaptiveSoftmax(64, counts, cutoffs="auto").bounds and layer.tails == 2
    monkeypatch.setattr("lvsoftmax.layers.adaptive_softmax.cost_model", None)  # what is explicit asks nobody
    again = AdaptiveSoftmax(64, counts, **layer.resolved())
    again.load_state_dict(layer.state_dict())
    hidden = torch.randn(5, 64)
    assert torch.equal(again.log_prob(hidden), layer.log_prob(hidden)) and again.resolved() == {}
    assert Permuted(layer, torch.arange(20_000)).resolved() == layer.resolved() == {"cutoffs": layer.bounds[1:-1]}


@pytest.mark.parametrize("div_value", [1.0, 2.0, 4.0])
def test_cutoffs_by_cost_are_the_cheapest_of_the_grid(monkeypatch, div_value):
    monkeypatch.setattr("lvsoftmax.layers.adaptive_softmax.cost_model", lambda *_: CostModel(COEFFICIENTS))
    monkeypatch.setattr("lvsoftmax.layers.adaptive_softmax.MOST_TAILS", 2)
    monkeypatch.setattr("lvsoftmax.layers.adaptive_softmax.STEPS", 3)
    counts, hidden = zipf_counts(20_000), 64
    share = counts.double() / counts.sum()

    def seconds_of(cutoffs):
        edges, cost = [0, *cutoffs, 20_000], CostModel(COEFFICIENTS)
        total = cost(1024, hidden, edges[1])
        for k, (first, last) in enumerate(zip(edges[1:], edges[2:], strict=False)):
            mass, width = share[first:last].sum().item(), hidden // div_value ** (k + 1)
            hit = 1 - (1 - mass) ** 1024
            total += hit * (cost(1024 * mass / hit, width, last - first) + cost(1024 * mass / hit, hidden, width))
        return total

    grid = [round(10 ** (i / 3)) for i in range(13)]
    options = [list(cutoffs) for number in (0, 1, 2) for cutoffs in itertools.combinations(grid, number)]
    best = min(options, key=seconds_of)
    chosen = AdaptiveSoftmax(hidden, counts, cutoffs="auto", div_value=div_value).bounds[1:-1]
    assert chosen == best and len(best) == 2


def test_a_tail_by_cost_reads_a_sixteenth_of_the_hidden_vector_at_least(monkeypatch):
    monkeypatch.setattr("lvsoftmax.layers.adaptive_softmax.cost_model", lambda *_: CostModel(COEFFICIENTS))
    for div_value, widths in {1.0: [64] * 8, 2.0: [32, 16, 8, 4], 3.0: [21, 7], 4.0: [16, 4], 16.0: [4]}.items():
        layer = AdaptiveSoftmax(64, zipf_counts(200_000), cutoffs="auto", div_value=div_value)
        assert [weight.shape[1] for weight in layer.tail_weights] == widths
    assert AdaptiveSoftmax(64, zipf_counts(200_000), cutoffs="auto", div_value=17.0).tails == 0


def test_a_state_of_other_bands_is_refused_by_name():
    state = AdaptiveSoftmax(D, COUNTS, cutoffs=[5, 20]).state_dict()
    for cutoffs in ([5], [5, 21], [6, 20], [5, 20, 30], []):
        with pytest.raises(ValueError, match=r"^state_dict has tails from \[5, 20\]; build the layer with cutoffs"):
            AdaptiveSoftmax(D, COUNTS, cutoffs=cutoffs).load_state_dict(state)
    without_tails = AdaptiveSoftmax(D, COUNTS, cutoffs=[]).state_dict()
    with pytest.raises(ValueError, match=r"state_dict has tails from \[\]; build the layer with cutoffs=\[\]"):
        AdaptiveSoftmax(D, COUNTS, cutoffs=[5, 20]).load_state_dict(without_tails)


def test_without_tails_it_is_the_full_softmax():
    layer = randomise(AdaptiveSoftmax(D, COUNTS, cutoffs=[]))
    full = FullSoftmax(D, COUNTS)
    full.weight.data, full.bias.data = layer.head_weight.data, layer.head_bias.data
    hidden, target, weight = torch.randn(N, D), torch.randint(97, (N,)), torch.randn(N)
    assert_close(layer.log_prob(hidden), full.log_prob(hidden), 1e-6)
    assert_close(layer.loss(hidden, target, weight), full.loss(hidden, target, weight), 1e-6)


def test_entries_of_tails_start_at_their_mass():
    layer = AdaptiveSoftmax(D, COUNTS)
    mass = torch.stack([band.sum() for band in ((COUNTS + 1.0) / (COUNTS + 1.0).sum()).split([2, 17, 78])])
    assert_close(layer.head_bias[2:].exp(), mass[1:], 1e-6)
    assert AdaptiveSoftmax(D, COUNTS, bias=False).head_bias is None


# -- cost -------------------------------------------------------------------------------------------------------------


def test_a_tail_costs_for_its_own_tokens_only():
    counts = zipf_counts(1000)
    layer = AdaptiveSoftmax(64, counts, cutoffs=[50, 200], backend="eager")
    target = torch.tensor([0] * 90 + [100] * 8 + [999] * 2)[torch.randperm(100)]
    hidden = torch.randn(100, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter, LargestResult() as largest:
        layer.nll(hidden, target)
    expected = 2 * (100 * 52 * 64 + 8 * (64 * 16 + 16 * 150) + 2 * (64 * 4 + 4 * 800))
    assert counter.get_total_flops() == pytest.approx(expected)
    with largest:
        layer.loss(hidden, target, torch.ones(100)).backward()
    assert largest.entries <= 100 * 64 < 100 * 1000


def test_a_tail_without_tokens_has_no_gradient():
    layer = AdaptiveSoftmax(D, COUNTS, cutoffs=[5, 20])
    layer.loss(torch.randn(3, D), torch.tensor([0, 7, 4]), torch.ones(3)).backward()
    has_gradient = {name: parameter.grad is not None for name, parameter in layer.named_parameters()}
    assert {name for name, has in has_gradient.items() if not has} == {
        "projections.1",
        "tail_weights.1",
        "tail_biases.1",
    }


# -- input embedding --------------------------------------------------------------------------------------------------


def test_embeddings_are_rows_widened_by_the_transposed_projections():
    layer = randomise(AdaptiveSoftmax(D, COUNTS, cutoffs=[5, 20]).double())
    table = torch.cat(
        [layer.head_weight[:5]]
        + [weight @ projection for weight, projection in zip(layer.tail_weights, layer.projections, strict=True)]
    )
    for ids in (torch.randint(97, (3, 50)), torch.tensor([96, 0, 96, 6, 0]), torch.tensor(20), torch.tensor([]).long()):
        actual, expected = layer.embed(ids), table[ids]
        assert actual.shape == (*ids.shape, D)
        assert_close(actual, expected, 1e-12)
        upstream = torch.randn_like(expected)
        assert_close(gradients(actual, upstream, layer), gradients(expected, upstream, layer), 1e-12)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cutoffs": [0.2, 0.1]}, r"cutoffs=\[0.2, 0.1\]: must rise"),
        ({"cutoffs": [10, 10]}, r"cutoffs=\[10, 10\]: must rise"),
        ({"cutoffs": [0, 10]}, r"cutoffs=\[0, 10\]: ranks must be at least 1 and below the 97 words"),
        ({"cutoffs": [10, 97]}, r"cutoffs=\[10, 97\]: ranks must be at least 1 and below the 97 words"),
        ({"cutoffs": [0.1, 1.0]}, r"cutoffs=\[0.1, 1.0\]: give ranks \(whole numbers\) or shares"),
        ({"cutoffs": [0.1, 10]}, r"cutoffs=\[0.1, 10\]: give ranks \(whole numbers\) or shares"),
        ({"cutoffs": "cheap"}, "cutoffs='cheap': give ranks or shares, rising, or auto"),
        ({"div_value": 0.5}, "div_value=0.5: must be a finite number of at least 1"),
        ({"div_value": float("inf")}, "div_value=inf: must be a finite number of at least 1"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_bad_cutoffs(options, message):
    with pytest.raises(ValueError, match=message) as error:
        AdaptiveSoftmax(D, COUNTS, **options)
    assert "\n" not in str(error.value)
