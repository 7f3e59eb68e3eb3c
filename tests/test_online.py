"""The online log-sum-exp and its attention: laws of the monoid, PyTorch's own results, memory."""

import itertools
import math
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from cases import LargestResult, assert_close
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lvsoftmax import cost
from lvsoftmax.ops.online import Running, logsumexp_of, merge, nothing, online_attention, running

linux = pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark can be reset on Linux only")


# -- the monoid -------------------------------------------------------------------------------------------------------


def pieces(*sizes, spread=1.0):
    return [spread * torch.randn(3, size, dtype=torch.float64) for size in sizes]


@pytest.mark.parametrize("shift", [0.0, 2e6])
@pytest.mark.parametrize("spread", [1.0, 300.0, 1e6])
def test_associative_and_commutative_with_a_zero(spread, shift):
    a, b, c = (running(piece - shift) for piece in pieces(4, 1, 7, spread=spread))
    assert_close(merge(merge(a, b), c), merge(a, merge(b, c)), 1e-13)
    assert_close(merge(a, b), merge(b, a), 1e-15)
    zero = nothing((3,), a.total)
    assert_close(merge(a, zero), a, 0.0)
    assert_close(merge(zero, a), a, 0.0)
    assert_close(merge(zero, zero), zero, 0.0)
    assert zero.logsumexp().tolist() == [-math.inf] * 3


@pytest.mark.parametrize("spread", [1.0, 300.0, 1e6])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_pieces_in_any_order_make_the_whole(order, spread):
    parts = pieces(4, 1, 7, spread=spread)
    whole = torch.cat(parts, 1)
    assert_close(logsumexp_of(parts[i] for i in order), whole.logsumexp(1), 1e-13)


def test_a_stream_number_by_number():
    numbers = 200 * torch.randn(50, dtype=torch.float64)
    assert_close(logsumexp_of(number[None] for number in numbers), numbers.logsumexp(0), 1e-13)


def test_the_pair_is_what_it_says():
    x = torch.tensor([[1.0, 3.0, 2.0], [-5.0, -5.0, -5.0]])
    pair = running(x)
    assert pair.maximum.tolist() == [3, -5]
    assert pair.total.tolist() == pytest.approx([1 + math.exp(-1) + math.exp(-2), 3])
    assert_close(running(x.T, 0), pair, 0.0)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_any_dimension(dim):
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    assert_close(logsumexp_of(x.split(2, dim), dim), x.logsumexp(dim), 1e-13)


def test_infinite_numbers_and_empty_pieces():
    inf = math.inf
    x = torch.tensor([[-inf, 1.0, -inf, 2.0], [-inf, -inf, -inf, -inf], [inf, 1.0, 0.0, -inf]])
    expected = x.logsumexp(1)
    for size in (1, 2, 3):
        assert_close(logsumexp_of(x.split(size, 1)), expected, 1e-6)
    assert_close(logsumexp_of([x[:, :0], x, x[:, :0]]), expected, 1e-6)
    assert logsumexp_of([x[:, :0]]).tolist() == [-inf] * 3


def test_no_overflow_and_precisions():
    x = torch.tensor([[3e38, 3e38, -3e38]])
    assert logsumexp_of(x.split(1, 1)) == torch.tensor(3e38)
    numbers = torch.randn(4000).bfloat16()
    total = logsumexp_of(numbers.split(100))
    assert total.dtype == torch.float32
    assert_close(total, numbers.float().logsumexp(0), 1e-6)


def test_gradients_are_those_of_the_whole():
    whole = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, dtype=torch.float64)
    value = logsumexp_of(whole.split(4, 1))
    (gradient,) = torch.autograd.grad(value, whole, upstream)
    assert_close(gradient, (upstream[:, None] * whole.softmax(1)).detach(), 1e-13)
    assert torch.autograd.gradcheck(lambda x: logsumexp_of(x.split(4, 1)), whole)
    assert torch.autograd.gradgradcheck(lambda x: logsumexp_of(x.split(4, 1)), whole)


def shard(number: int) -> tuple[list[float], list[float]]:
    """What a process of its own knows of its share of the numbers."""
    pair = running(300 * torch.randn(2, 100, generator=torch.Generator().manual_seed(number), dtype=torch.float64))
    return pair.maximum.tolist(), pair.total.tolist()


@pytest.mark.slow
def test_over_processes():
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        pairs = [Running(*map(torch.tensor, pair)) for pair in pool.map(shard, range(4))]
    generators = (torch.Generator().manual_seed(number) for number in range(4))
    whole = torch.cat([300 * torch.randn(2, 100, generator=g, dtype=torch.float64) for g in generators], 1)
    total = merge(merge(pairs[3], pairs[0]), merge(pairs[2], pairs[1])).logsumexp()
    assert_close(total.double(), whole.logsumexp(1), 1e-6)


def test_no_pieces():
    with pytest.raises(ValueError, match="no pieces"):
        logsumexp_of([])


# -- attention --------------------------------------------------------------------------------------------------------

SHAPES = {
    "as many keys as queries": ((2, 3, 13, 4), (2, 3, 13, 4), (2, 3, 13, 5)),
    "fewer keys": ((13, 4), (6, 4), (6, 5)),
    "more keys": ((2, 6, 4), (2, 13, 4), (2, 13, 5)),
    "one query": ((1, 4), (13, 4), (13, 5)),
    "one key": ((13, 4), (1, 4), (1, 1)),
    "broadcast": ((2, 3, 13, 4), (2, 1, 13, 4), (13, 5)),
}


def operands(shapes, scale=1.0, dtype=torch.float64):
    return [(scale * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_() for shape in shapes]


def plain(query, key, value, causal=False, scale=None, backend=SDPBackend.MATH):
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    query, key, value = (x.expand(*batch, *x.shape[-2:]) for x in (query, key, value))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)


@pytest.mark.parametrize("block", [1, 4, 13, 100])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_attention_is_pytorchs(shapes, causal, block):
    inputs = operands(shapes)
    actual, expected = online_attention(*inputs, block, causal=causal), plain(*inputs, causal)
    assert_close(actual, expected, 1e-12)
    upstream = torch.randn_like(expected)
    assert_close(*(torch.autograd.grad(output, inputs, upstream) for output in (actual, expected)), 1e-12)


@pytest.mark.parametrize("scale", [0.0, -0.7, 2.0])
def test_the_scale_is_pytorchs(scale):
    inputs = operands(SHAPES["more keys"])
    actual, expected = online_attention(*inputs, 4, scale=scale), plain(*inputs, scale=scale)
    assert_close(actual, expected, 1e-12)
    upstream = torch.randn_like(expected)
    assert_close(*(torch.autograd.grad(output, inputs, upstream) for output in (actual, expected)), 1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck_of_attention(causal):
    inputs = operands(((2, 5, 3), (2, 5, 3), (2, 5, 2)))
    assert torch.autograd.gradcheck(lambda *x: online_attention(*x, 2, causal=causal), inputs)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_to_scores_of_hundreds(causal):
    """Maxima that rise from block to block by more than an exponential holds."""
    query, key, value = operands(((1, 2, 40, 8),) * 3, scale=30.0, dtype=torch.float32)
    with torch.no_grad():
        key *= torch.linspace(0, 3, 40)[:, None]
    for ours, theirs in errors_of((query, key, value), causal, 4, flash):
        assert ours <= 3 * theirs


def flash(query, key, value, causal):
    return plain(query, key, value, causal, backend=SDPBackend.FLASH_ATTENTION)


def eager(query, key, value, causal):
    """Every step in the precision of the inputs."""
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1) @ value


def errors_of(inputs, causal, block, theirs):
    """How far values and gradients are off in the precision of the inputs: ours and PyTorch's."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = plain(*exact, causal)
    upstream = torch.randn_like(expected)
    truth = (expected, *torch.autograd.grad(expected, exact, upstream))
    found = []
    for output in (online_attention(*inputs, block, causal=causal), theirs(*inputs, causal)):
        found.append((output, *torch.autograd.grad(output, inputs, upstream.to(output.dtype))))
        assert all(x.dtype == inputs[0].dtype for x in found[-1])
    return [tuple((x.double() - y).norm() for x in pair) for *pair, y in zip(*found, truth, strict=True)]


@pytest.mark.parametrize("causal", [False, True])
def test_bfloat16_is_not_further_off_than_the_plain_steps(causal):
    inputs = operands(((2, 300, 16),) * 3, dtype=torch.bfloat16)
    for ours, theirs in errors_of(inputs, causal, 64, eager):
        assert ours <= 1.5 * theirs


def test_autocast():
    inputs = operands(((2, 300, 16),) * 3, dtype=torch.float32)
    exact = online_attention(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = online_attention(*inputs)
    assert rounded.dtype == torch.float32
    assert 1e-6 < (rounded - exact).abs().mean() < 1e-2
    rounded.sum().backward()


def test_no_array_holds_a_score_per_query_and_key():
    size, block = 64, 8
    inputs = operands(((size, 4),) * 3)
    with LargestResult() as largest:
        online_attention(*inputs, block).sum().backward()
    assert largest.entries == size * block


@linux
def test_memory_is_linear_in_the_number_of_keys():
    def extra(size):
        inputs = operands(((size, 16),) * 3, dtype=torch.float32)
        return cost.extra_bytes(lambda: online_attention(*inputs, 64).sum().backward(), torch.device("cpu"))

    extra(1024)
    small, large = extra(2048), extra(8192)
    assert large < 6 * small + 2**22
    assert large < 8192 * 8192 * 4 / 8  # a matrix of all scores takes eight times as much


def test_causal_attention_costs_half():
    inputs = operands(((256, 4),) * 3)
    flops = []
    for causal in (False, True):
        with FlopCounterMode(display=False) as counter:
            online_attention(*inputs, 16, causal=causal).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == 2 * 256 * 256 * (4 * 2 + 4 * 5)
    assert flops[1] / flops[0] == pytest.approx(0.5, abs=0.05)


def test_bad_input_is_named():
    inputs = operands(((5, 4),) * 3)
    with pytest.raises(ValueError, match="block=0: must be at least 1"):
        online_attention(*inputs, 0)
    with pytest.raises(ValueError, match="there are no keys"):
        online_attention(inputs[0], inputs[1][:0], inputs[2][:0])
