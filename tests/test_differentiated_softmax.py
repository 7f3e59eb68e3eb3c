"""What the differentiated softmax promises beyond the laws: its bands, its memory, its cost, its errors."""

import pytest
import torch
import torch.nn.functional as F
from cases import COUNTS, LargestResult, assert_close, randomise, zipf_counts
from torch.utils.flop_counter import FlopCounterMode

from lvsoftmax.layers.differentiated_softmax import DifferentiatedSoftmax
from lvsoftmax.layers.full_softmax import FullSoftmax
from lvsoftmax.ops.linear_cross_entropy import banded_cross_entropy, banded_cross_entropy_loss, reference

N, D = 11, 8


@pytest.fixture
def blocks_of_four_tokens(monkeypatch):
    """Several blocks, the last of them shorter."""
    monkeypatch.setattr(reference, "BLOCK", 4 * len(COUNTS))
    monkeypatch.setattr(reference, "FEWEST", 4)


def operands(dtype=torch.float64, sizes=(5, 0, 92), widths=(3, 2, 1)):
    inputs = [torch.randn(N, width, dtype=dtype, requires_grad=True) for width in widths]
    weights = [
        torch.randn(size, width, dtype=dtype, requires_grad=True) for size, width in zip(sizes, widths, strict=True)
    ]
    bias = torch.randn(sum(sizes), dtype=dtype, requires_grad=True)
    return inputs, weights, bias, torch.randint(sum(sizes), (N,))


def plain(inputs, weights, bias, target):
    logits = torch.cat([x @ weight.T for x, weight in zip(inputs, weights, strict=True)], 1) + bias
    return F.cross_entropy(logits, target, reduction="none")


# -- the operation ----------------------------------------------------------------------------------------------------


def test_banded_cross_entropy_per_token(backend, blocks_of_four_tokens):
    inputs, weights, bias, target = operands()
    variables = [*inputs, *weights, bias]
    upstream = torch.randn(N, dtype=torch.float64)
    upstream[::3] = 0
    actual = banded_cross_entropy(inputs, weights, bias, target, backend=backend)
    expected = plain(inputs, weights, bias, target)
    assert_close(actual, expected, 1e-12)
    assert_close(
        torch.autograd.grad(actual, variables, upstream), torch.autograd.grad(expected, variables, upstream), 1e-12
    )


def test_banded_cross_entropy_in_sum(backend, blocks_of_four_tokens):
    inputs, weights, bias, target = operands()
    token_weight = torch.linspace(-1, 1, N, dtype=torch.float64).requires_grad_()
    variables = [*inputs, *weights, bias, token_weight]
    upstream = torch.tensor(-2.5, dtype=torch.float64)
    actual = banded_cross_entropy_loss(inputs, weights, bias, target, token_weight, backend=backend)
    expected = (token_weight * plain(inputs, weights, bias, target)).sum()
    assert_close(actual, expected, 1e-12)
    assert_close(
        torch.autograd.grad(actual, variables, upstream, retain_graph=True),
        torch.autograd.grad(expected, variables, upstream),
        1e-12,
    )
    if backend == "eager":
        with pytest.raises(RuntimeError, match="can be differentiated once; use the per-token one"):
            torch.autograd.grad(actual, variables, upstream)


@pytest.mark.parametrize("wanted", range(7))
def test_one_gradient_alone(backend, wanted):
    inputs, weights, bias, target = operands()
    variables = [*inputs, *weights, bias]
    for i, variable in enumerate(variables):
        variable.requires_grad_(i == wanted)
    expected = torch.autograd.grad(plain(inputs, weights, bias, target).sum(), variables[wanted])
    ones = torch.ones(N, dtype=torch.float64)
    for actual in (
        banded_cross_entropy(inputs, weights, bias, target, backend=backend).sum(),
        banded_cross_entropy_loss(inputs, weights, bias, target, ones, backend=backend),
    ):
        assert_close(torch.autograd.grad(actual, variables[wanted]), expected, 1e-12)


def test_no_array_holds_a_logit_per_token_and_word(blocks_of_four_tokens):
    layer = DifferentiatedSoftmax(4, COUNTS, backend="eager")
    hidden, target = torch.randn(N, 4, requires_grad=True), torch.randint(len(COUNTS), (N,))
    with LargestResult() as largest:
        layer.nll(hidden, target).sum().backward()
        layer.loss(hidden, target, torch.ones(N)).backward()
    assert largest.entries == reference.BLOCK < N * len(COUNTS)


# -- the layer --------------------------------------------------------------------------------------------------------


def test_a_band_reads_its_slice_only():
    layer = randomise(DifferentiatedSoftmax(D, COUNTS, bands=[0.1, 0.3, 0.6], widths=[0.5, 0.25, 0.25]))
    assert [tuple(weight.shape) for weight in layer.weights] == [(10, 4), (29, 2), (58, 2)]
    hidden = torch.randn(1, D, requires_grad=True)
    logits = layer.logits(hidden)
    for word, columns in ((0, [0, 1, 2, 3]), (9, [0, 1, 2, 3]), (10, [4, 5]), (38, [4, 5]), (39, [6, 7]), (96, [6, 7])):
        (slope,) = torch.autograd.grad(logits[0, word], hidden, retain_graph=True)
        assert slope[0].nonzero().flatten().tolist() == columns


def test_one_band_is_the_full_softmax():
    layer = DifferentiatedSoftmax(D, COUNTS, bands=[1.0], widths=[1.0])
    full = FullSoftmax(D, COUNTS)
    full.load_state_dict({"weight": layer.weights[0], "bias": layer.bias, "inverse_temperature": torch.ones(())})
    hidden, target, weight = torch.randn(N, D), torch.randint(97, (N,)), torch.randn(N)
    assert_close(layer.log_prob(hidden), full.log_prob(hidden), 1e-6)
    assert_close(layer.nll(hidden, target), full.nll(hidden, target), 1e-6)
    assert_close(layer.loss(hidden, target, weight), full.loss(hidden, target, weight), 1e-6)


@pytest.mark.parametrize("projection", ["slice", "full"])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_bands_may_be_empty(size, projection):
    counts = torch.arange(size, 0, -1)
    layer = randomise(
        DifferentiatedSoftmax(8, counts, bands=[0.02, 0.96, 0.02], projection=projection).double(), scale=1.0
    )
    assert [len(weight) for weight in layer.weights] == [0, size, 0]
    hidden, target = torch.randn(4, 8, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 1, 0])
    loss = layer.loss(hidden, target, torch.ones(4, dtype=torch.float64))
    expected = -layer.log_prob(hidden).gather(1, target[:, None]).sum()
    assert_close(loss, expected, 1e-12)
    assert_close(torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden), 1e-12)


def test_bands_need_their_share_of_the_operations():
    counts = zipf_counts(1000)
    hidden, target = torch.randn(4, 64), torch.randint(1000, (4,))

    def operations(layer):
        with FlopCounterMode(display=False) as counter:
            layer.nll(hidden, target)
        return counter.get_total_flops()

    full = operations(FullSoftmax(64, counts))
    share = 0.05 * 0.5 + 0.25 * 0.25 + 0.7 * 0.25
    assert operations(DifferentiatedSoftmax(64, counts)) == pytest.approx(share * full)
    projected = DifferentiatedSoftmax(64, counts, projection="full", widths=[0.5, 0.25, 0.125])
    assert operations(projected) == pytest.approx((0.175 + 0.875 * 64 / 1000) * full)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 6}, "hidden_size=6: a band needs 0.25 of it, which is 1.5 columns; choose a multiple"),
        ({"hidden_size": 1}, "hidden_size=1: a band needs 0.5 of it, which is 0.5 columns"),
        ({"bands": [0.5, 0.4, 0.2]}, r"bands=\[0.5, 0.4, 0.2\] must cover the vocabulary"),
        ({"widths": [0.5, 0.5]}, r"widths=\[0.5, 0.5\]: give one width for each of the 3 bands"),
        ({"widths": [0.5, 0.25, 0.5]}, r"widths=\[0.5, 0.25, 0.5\]: the slices share out the hidden vector"),
        ({"widths": [1.5, 0.5, 0.25], "projection": "full"}, r"widths=\[1.5, 0.5, 0.25\]: must be in \(0, 1\]"),
        ({"widths": [1.0, 0.25, 0.0]}, r"widths=\[1.0, 0.25, 0.0\]: must be in \(0, 1\]"),
    ],
)
def test_bad_bands(options, message):
    with pytest.raises(ValueError, match=message) as error:
        DifferentiatedSoftmax(**({"hidden_size": D, "counts": COUNTS} | options))
    assert "\n" not in str(error.value)


def test_a_target_in_no_band_has_no_loss():
    """Where word ids are not looked through, on CUDA, it would pass for a word of no score."""
    hidden, weight = torch.randn(3, 4), torch.randn(7, 4)
    found = banded_cross_entropy([hidden], [weight], torch.zeros(7), torch.tensor([-1, 2, -100]), backend="eager")
    assert found.isnan().tolist() == [True, False, True]
