"""What can be seen on a CUDA device alone: waiting for it, its memory, and every layer by the kernels made for it.

Exempt from the first are steps whose sizes depend on data (house rule 7). Among the kernels here that is the number of
rows of a row-sparse gradient, of trees and of words of a token's own, one number per step; and for groups of words the
largest group of the table along with it.
"""

import copy

import pytest
import torch
from cases import CASES, COUNTS, HIDDEN, Batch, assert_close, dense, gradients, randomise
from omegaconf import OmegaConf

from lvsoftmax import runs
from lvsoftmax.ops import linear_cross_entropy as exact
from lvsoftmax.ops import partition
from lvsoftmax.ops.gather_dot import gather_dot
from lvsoftmax.ops.grouped_nll import grouped_nll
from lvsoftmax.ops.linear_cross_entropy import gpu
from lvsoftmax.ops.path_nll import path_nll

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture
def no_waiting():
    """Everything that makes the host wait for the device is an error, once kernels are compiled."""

    def run(step):
        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return run


def operands(tokens, width, vocab, dtype=torch.bfloat16):
    hidden, weight = (
        torch.randn(rows, width, device="cuda").mul_(width**-0.25).to(dtype).requires_grad_()
        for rows in (tokens, vocab)
    )
    bias = torch.randn(vocab, device="cuda", requires_grad=True)
    return hidden, weight, bias, torch.randint(vocab, (tokens,), device="cuda")


def step(hidden, weight, bias, target, weights, backend="triton"):
    loss = exact.linear_cross_entropy_loss(hidden, weight, bias, target, weights, backend=backend)
    nll = exact.linear_cross_entropy(hidden, weight, bias, target, backend=backend)
    variables = (hidden, weight, bias)
    return loss, nll, *torch.autograd.grad(loss, variables), *torch.autograd.grad(nll, variables, weights)


def test_exact_loss_waits_for_nothing(no_waiting):
    given = (*operands(300, 64, 5000), torch.rand(300, device="cuda"))
    no_waiting(lambda: step(*given))


def test_exact_loss_gives_the_same_bits():
    given = (*operands(1000, 256, 33278), torch.rand(1000, device="cuda"))
    first = step(*given)
    for _ in range(3):
        assert all(map(torch.equal, first, step(*given)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "width", "vocab"), [(1, 1, 2), (130, 72, 1000), (517, 256, 33278)])
def test_exact_loss_errs_no_more_than_pytorch(tokens, width, vocab, dtype):
    given = (*operands(tokens, width, vocab, dtype), torch.randn(tokens, device="cuda"))
    exactly = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in given]
    hidden, weight, bias = given[:3]
    eager = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(hidden, weight, bias.to(dtype)).float(), given[3], reduction="none"
    )
    plain = (eager * given[4]).sum()
    allowed = (plain, eager, *torch.autograd.grad(plain, given[:3]) * 2)
    for found, other, true in zip(step(*given), allowed, step(*exactly, backend="eager"), strict=True):
        assert (found - true).norm() <= 1.2 * (other - true).norm() + (
            4e-3 if dtype.itemsize == 2 else 1e-5
        ) * true.norm()


@pytest.mark.parametrize("weighted", [True, False])
def test_exact_loss_holds_no_logits(weighted):
    tokens, width, vocab = 4096, 64, 200_000
    hidden, weight, bias, target = operands(tokens, width, vocab)
    weights = torch.ones(tokens, device="cuda")
    for _ in range(2):
        hidden.grad = weight.grad = bias.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if weighted:
            exact.linear_cross_entropy_loss(hidden, weight, bias, target, weights, backend="triton").backward()
        else:
            exact.linear_cross_entropy(hidden, weight, bias, target, backend="triton").sum().backward()
        peak = torch.cuda.max_memory_allocated() - before
    results = 2 * weight.numel() + 4 * vocab + 4 * hidden.numel()
    assert peak <= results + 6 * gpu.PIECE < tokens * vocab * 2 / 8


def test_a_table_of_more_than_two_to_the_31_entries():
    vocab, width = 2**20 + 3, 2**11 + 8
    weight = torch.zeros(vocab, width, device="cuda", dtype=torch.bfloat16)
    weight[-1] = 0.25
    hidden = torch.full((3, width), 2**-9, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.tensor([vocab - 1, 0, 2**20], device="cuda")
    nll = exact.linear_cross_entropy(hidden, weight, None, target, backend="triton")
    logit = 0.25 * 2**-9 * width
    normaliser = torch.log(torch.tensor(vocab - 1.0) + torch.tensor(logit).exp()).item()
    assert nll.tolist() == pytest.approx([normaliser - logit, normaliser, normaliser], rel=1e-5)
    (gradient,) = torch.autograd.grad(nll[0], hidden)
    assert gradient[0].tolist() == pytest.approx([-0.25] * width, rel=1e-2)


# -- trees, words of a token's own, groups of words --------------------------------------------------------------------


def tree_step(sparse, backend="triton", vocab=5000, tokens=2000, width=96, dtype=torch.float32):
    tree = partition.huffman_tree(10**6 // torch.arange(1, vocab + 1).numpy())
    source = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (
        torch.randn(rows, width, generator=source, device="cuda").mul_(0.3).to(dtype).requires_grad_()
        for rows in (tokens, vocab - 1)
    )
    bias = torch.randn(vocab - 1, generator=source, device="cuda", requires_grad=True)
    branches = [torch.from_numpy(x).cuda() for x in (tree.node_branch, tree.word_branch, partition.leaf_ranks(tree))]
    depth = int(partition.depths(tree).max())
    target = (vocab ** torch.rand(tokens, generator=source, device="cuda")).long() - 1
    upstream = torch.randn(tokens, generator=source, device="cuda")
    pace = torch.ones_like(bias)

    def step():
        nll = path_nll(*(hidden, weight, bias, pace, *branches, depth, target), sparse=sparse, backend=backend)
        return nll, *torch.autograd.grad(nll, (hidden, weight, bias), upstream)

    return step


def gather_step(sparse, backend="triton", vocab=3000, tokens=300, words=70, width=96, dtype=torch.float32):
    source = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (
        torch.randn(rows, width, generator=source, device="cuda").to(dtype).requires_grad_() for rows in (tokens, vocab)
    )
    bias = torch.randn(vocab, generator=source, device="cuda", requires_grad=True)
    ids = torch.randint(vocab, (tokens, words), generator=source, device="cuda")
    ids[:, 0] = 7  # a row that every token has
    upstream = torch.randn(tokens, words, generator=source, device="cuda")

    def step():
        logit = gather_dot(hidden, weight, bias, ids, sparse=sparse, backend=backend)
        return logit, *torch.autograd.grad(logit, (hidden, weight, bias), upstream)

    return step


def group_step(sparse, backend="triton", vocab=6000, tokens=700, width=96, dtype=torch.float32):
    source = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (
        torch.randn(rows, width, generator=source, device="cuda").mul_(0.3).to(dtype).requires_grad_()
        for rows in (tokens, vocab)
    )
    bias = torch.randn(vocab, generator=source, device="cuda", requires_grad=True)
    bound = torch.cat([torch.arange(0, vocab, 83), torch.tensor([vocab])]).cuda()
    target = (vocab ** torch.rand(tokens, generator=source, device="cuda")).long() - 1
    upstream = torch.randn(tokens, generator=source, device="cuda")

    def step():
        nll = grouped_nll(hidden, weight, bias, bound, target, sparse=sparse, backend=backend)
        return nll, *torch.autograd.grad(nll, (hidden, weight, bias), upstream)

    return step


for_all = pytest.mark.parametrize("make", [tree_step, gather_step, group_step])


@pytest.mark.parametrize("make", [tree_step, gather_step])
def test_pairs_wait_for_nothing(make, no_waiting):
    no_waiting(make(sparse=False))


@for_all
@pytest.mark.parametrize("sparse", [True, False])
def test_pairs_give_the_same_bits(make, sparse):
    step = make(sparse)
    first = [x.to_dense() for x in step()]
    for _ in range(3):
        assert all(torch.equal(x, y.to_dense()) for x, y in zip(first, step(), strict=True))


@for_all
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse", [True, False])
def test_pairs_equal_the_reference(make, sparse, dtype):
    found, expected = (make(sparse, backend, dtype=dtype)() for backend in ("triton", "eager"))
    for one, other in zip(found, expected, strict=True):
        assert one.is_sparse == other.is_sparse and one.dtype == other.dtype
        error = (one.to_dense().double() - other.to_dense().double()).norm() / other.to_dense().double().norm()
        assert error <= {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3}[one.dtype]


# -- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.value == "triton"], ids=str)
def test_a_layer_on_the_device_equals_itself_on_the_cpu(case):
    here = randomise(
        runs.build(OmegaConf.to_container(case.config) | {"backend": "eager"} | dense(case), HIDDEN, COUNTS)
    )
    there = copy.deepcopy(here).cuda()
    there.backend = "triton"
    batch = Batch.of(here, dtype=torch.float32)
    moved = Batch(*(x.detach().cuda().requires_grad_(x.requires_grad) for x in vars(batch).values()))
    sample = batch.draw(here)
    on_device = None if sample is None else type(sample)(*(x.cuda() for x in sample))
    for name in ("forward", "nll"):
        results = []
        for layer, given, drawn in ((here, batch, sample), (there, moved, on_device)):
            arguments = (given.previous, drawn) if name == "forward" else ()
            value = getattr(layer, name)(given.hidden, given.target, *arguments)
            slopes = gradients(value, given.upstream, layer, given.hidden)
            results.append([value.cpu(), *(x.cpu() for x in slopes.values())])
        assert_close(*results, 1e-4)


def test_a_device_without_a_number_has_the_stream_that_draws_take():
    layer = CASES[0].build().to("cuda")
    assert layer.generator(torch.device("cuda")) is layer.generator(layer.weight.device)
