"""Costs against what a layer must cost by its formula."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lvsoftmax import cost
from lvsoftmax.cost import Work, count_work, measure, peak_bytes, reset_peak
from lvsoftmax.layer import OutputLayer
from lvsoftmax.layers.class_softmax import ClassSoftmax
from lvsoftmax.layers.full_softmax import FullSoftmax
from lvsoftmax.ops import pairs

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark can be reset on Linux only")


def counts(vocab: int) -> Tensor:
    return torch.arange(vocab, 0, -1)


class OneProduct(OutputLayer):
    """A product by ``baddbmm_`` hidden in an autograd.Function, with a buffer of known size."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight):
            ctx.save_for_backward(hidden, weight)
            logits = hidden.new_zeros(1, len(hidden), len(weight)).baddbmm_(hidden[None], weight.T[None])[0]
            return logits.logsumexp(1)

        @staticmethod
        def backward(ctx, upstream):
            hidden, weight = ctx.saved_tensors
            return torch.zeros_like(hidden), torch.zeros_like(weight)

    def __init__(self, hidden_size, counts):
        super().__init__(hidden_size, counts)
        self.weight = nn.Parameter(torch.randn(len(counts), hidden_size))

    def log_prob(self, hidden):
        raise NotImplementedError

    def forward(self, hidden, target, previous=None, sample=None):
        return self.Function.apply(hidden, self.weight)


def test_operations_are_those_of_the_products():
    tokens, width, vocab = 600, 8, 50
    hidden, target = torch.randn(tokens, width), torch.randint(vocab, (tokens,))
    product = 2 * tokens * width * vocab
    # Logits, the hidden vectors' gradient, the table's gradient; the last by addmm_ over two chunks of tokens.
    assert measure(FullSoftmax(width, counts(vocab)), hidden, target, repeats=1).work.flops == 3 * product
    assert measure(OneProduct(width, counts(vocab)), hidden, target, repeats=1).work.flops == product


TABLE, ROW, FACTOR = torch.rand(30, 4), torch.arange(5), torch.rand(5)
RESULT, PAIRS = (
    torch.zeros(6, 4),
    torch.sparse_coo_tensor(torch.stack([ROW, ROW]), FACTOR, (6, 30), is_coalesced=True, check_invariants=False),
)
ROWS_OF_TABLE = 5 * 4 * 4


@pytest.mark.parametrize(
    ("run", "flops", "traffic"),
    [
        (lambda: TABLE @ TABLE.T, 2 * 30 * 4 * 30, 2 * 480 + 4 * 900),
        (lambda: torch.addmm(RESULT, RESULT, TABLE[:4]), 2 * 6 * 4 * 4, 3 * 96 + 64),
        (lambda: torch.addmm(RESULT, PAIRS, TABLE), 2 * 5 * 4, 96 + (2 * 40 + 20) + 480 + 96),
        (lambda: torch.addmm(RESULT, PAIRS, TABLE, out=RESULT), 2 * 5 * 4, 96 + (2 * 40 + 20) + 480 + 96),
        (lambda: TABLE.exp(), 0, 2 * 480),
        (lambda: TABLE.abs_(), 0, 2 * 480),
        (lambda: TABLE.t().reshape(2, 2, 30).expand(3, 2, 2, 30), 0, 0),
        (lambda: TABLE.new_empty(1000), 0, 0),
        (lambda: TABLE.new_zeros(1000), 0, 4000),
        (lambda: TABLE[ROW], 0, 40 + 2 * ROWS_OF_TABLE),
        (lambda: TABLE.index_select(0, ROW), 0, 40 + 2 * ROWS_OF_TABLE),
        (lambda: TABLE.index_add_(0, ROW, FACTOR[:, None].expand(5, 4)), 0, 40 + 20 + 2 * ROWS_OF_TABLE),
        (lambda: TABLE[:, 0].scatter_(0, ROW, 1.0), 0, 40 + 2 * 20),
        (
            lambda: torch.ops.aten._embedding_bag_forward_only(TABLE, ROW, ROW[:1], False, 0, False, FACTOR)[0],
            2 * 5 * 4,
            ROWS_OF_TABLE + 40 + 8 + 20 + 4 * 4 + 2 * 8,  # the bag's sum and what the backward pass wants to know
        ),
        (
            lambda: torch.ops.aten._embedding_bag_per_sample_weights_backward(TABLE, TABLE, ROW, ROW, ROW, 0),
            2 * 5 * 4,
            480 + ROWS_OF_TABLE + 3 * 40 + 20,
        ),
    ],
)
def test_work_is_counted_operation_by_operation(run, flops, traffic):
    assert count_work(run) == Work(flops, traffic)


def test_sums_of_rows_cost_the_same_in_memory_of_either_kind(monkeypatch):
    """Large gradients are products with a sparse matrix, whose shape says nothing of its entries."""
    layer = ClassSoftmax(8, counts(50), sparse=False, backend="eager")
    hidden, target = torch.randn(20, 8), torch.randint(50, (20,))
    small = measure(layer, hidden, target, repeats=1).work.flops
    monkeypatch.setattr(pairs, "LARGE", 0)
    assert measure(layer, hidden, target, repeats=1).work.flops == small


def test_parameters_are_counted():
    hidden, target = torch.randn(3, 8), torch.randint(50, (3,))
    assert measure(FullSoftmax(8, counts(50)), hidden, target, repeats=1).parameters == 50 * 9
    assert measure(FullSoftmax(8, counts(50), bias=False), hidden, target, repeats=1).parameters == 50 * 8
    frozen = FullSoftmax(8, counts(50))
    frozen.bias.requires_grad_(False)
    assert measure(frozen, hidden, target, repeats=1).parameters == 50 * 8


def test_time_is_the_median_of_the_repetitions(monkeypatch):
    seconds = iter([9.0, 1.0, 3.0, 2.0, 100.0])
    monkeypatch.setattr(cost, "seconds", lambda run, device: next(seconds))
    assert measure(FullSoftmax(8, counts(50)), torch.randn(3, 8), torch.zeros(3, dtype=torch.int64)).seconds == 3.0


def test_time_is_positive_and_gradients_are_gone():
    layer = FullSoftmax(8, counts(50))
    hidden = torch.randn(3, 8, requires_grad=True)
    result = measure(layer, hidden, torch.zeros(3, dtype=torch.int64), repeats=3)
    assert 0 < result.seconds < 5 and math.isfinite(result.seconds)
    assert hidden.grad is None and all(parameter.grad is None for parameter in layer.parameters())


@linux
def test_memory_is_that_of_the_step():
    tokens, width, vocab = 512, 64, 40_000
    hidden, target = torch.randn(tokens, width), torch.randint(vocab, (tokens,))
    extra = measure(FullSoftmax(width, counts(vocab)), hidden, target, repeats=1).peak_bytes
    logits, gradient = tokens * vocab * 4, vocab * width * 4
    assert 0.9 * (logits + gradient) < extra < 2.5 * (logits + gradient)


@linux
def test_the_peak_keeps_memory_that_is_gone_and_can_be_reset():
    reset_peak()
    before = peak_bytes()
    block = torch.ones(64 * MIB, dtype=torch.uint8)
    del block
    assert peak_bytes() - before > 60 * MIB
    reset_peak()
    assert peak_bytes() - before < 30 * MIB


def test_without_proc_the_peak_is_that_of_the_process(monkeypatch):
    def refuse(*_):
        raise FileNotFoundError

    known = peak_bytes()
    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(Path, "write_text", refuse)
    reset_peak()
    assert known / 2 < peak_bytes() < 2**45


def test_repeats_must_be_positive():
    with pytest.raises(ValueError, match="repeats=0"):
        measure(FullSoftmax(8, counts(50)), torch.randn(3, 8), torch.zeros(3, dtype=torch.int64), repeats=0)
