"""What is particular to the Triton kernels: tiles, parts and pieces, memory, and where they may run.

They run in Triton's interpreter where there is no CUDA device. That they compute what the other backends compute is
shown where those are tested.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lvsoftmax.ops import linear_cross_entropy as exact
from lvsoftmax.ops import pairs_gpu, partition, tiles
from lvsoftmax.ops.backends import Backends, BackendUnavailable, interprets_triton, triton
from lvsoftmax.ops.gather_dot import gather_dot
from lvsoftmax.ops.gather_dot import gpu as gather_gpu
from lvsoftmax.ops.grouped_nll import gpu as grouped_gpu
from lvsoftmax.ops.grouped_nll import grouped_nll
from lvsoftmax.ops.linear_cross_entropy import gpu
from lvsoftmax.ops.path_nll import gpu as path_gpu
from lvsoftmax.ops.path_nll import path_nll

DEVICE = torch.device("cpu" if interprets_triton() else "cuda")
REASON = triton(DEVICE)
for_triton = pytest.mark.skipif(REASON is not None, reason=f"triton: {REASON}")

N, D, V = 35, 20, 77


@pytest.fixture(autouse=True)
def on_the_device():
    with DEVICE:
        yield


@pytest.fixture
def small(monkeypatch):
    """Tiles of 16 by 16, so that the table is five tiles wide: parts of a sum are two, and pieces of the table."""
    tile = gpu.Tile(16, 16, 16, 4, 2)
    monkeypatch.setattr(gpu, "TILES", dict.fromkeys(gpu.TILES, tile))
    monkeypatch.setattr(gpu, "PIECE", 32 * N)
    monkeypatch.setattr(gpu, "PROGRAMS", 9)


@pytest.fixture
def allocated(monkeypatch):
    """The sizes of all that the backend allocates, which is filled with NaN."""
    sizes = []

    def empty(like, shape, dtype):
        memory = like.new_full(shape, torch.nan, dtype=dtype)
        sizes.append(memory.numel())
        return memory

    monkeypatch.setattr(gpu, "_empty", empty)
    return sizes


def operands(dtype=torch.float32, tokens=N, vocab=V, width=D):
    generator = torch.Generator(DEVICE).manual_seed(0)
    tensors = [torch.randn(*s, generator=generator).to(dtype) for s in ((tokens, width), (vocab, width), (vocab,))]
    target = torch.randint(vocab, (tokens,), generator=generator)
    return *(x.requires_grad_() for x in tensors), target


def plain(hidden, weight, bias, target, softcap=None):
    return F.cross_entropy(exact.soft_capped(F.linear(hidden, weight, bias), softcap), target, reduction="none")


# -- tiles, parts and pieces ------------------------------------------------------------------------------------------


@for_triton
@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("small")
def test_many_tiles_parts_and_pieces(dtype, softcap, allocated):
    *tensors, target = operands(dtype)
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    upstream = torch.linspace(-1, 2, N, dtype=torch.promote_types(dtype, torch.float32))
    expected = plain(*doubles, target, softcap)
    truth = torch.autograd.grad(expected, doubles, upstream.double())
    options = {"softcap": softcap, "backend": "triton"}
    nll = exact.linear_cross_entropy(*tensors, target, **options)
    loss = exact.linear_cross_entropy_loss(*tensors, target, upstream, **options)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5 if DEVICE.type == "cpu" else 1e-2}
    assert (nll - expected).abs().max() <= tolerance[dtype] * expected.max()
    assert (loss - (upstream * expected).sum()).abs() <= tolerance[dtype] * expected.sum()
    rounding = torch.finfo(dtype).eps
    for found in (torch.autograd.grad(nll, tensors, upstream), torch.autograd.grad(loss, tensors)):
        for gradient, true in zip(found, truth, strict=True):
            assert gradient.dtype == dtype
            assert (gradient - true).norm() <= (tolerance[dtype] + rounding) * true.norm()
    # what is cast, differentiated or summed at a time is a piece, never [N, V]
    assert max(allocated) <= max(gpu.PIECE, V * D) < N * V


@for_triton
@pytest.mark.usefixtures("small")
def test_a_sure_target_keeps_its_gradient_wherever_it_stands():
    """``1 - p`` is about 1e-7: the sum over the other words is joined of parts that lack the target, and of one that
    has nothing but it."""
    bias = torch.linspace(-3, 3, V)
    target = torch.arange(V)
    hidden, weight = 20 * torch.eye(V), torch.eye(V)
    weight.requires_grad_()
    doubles = weight.detach().double().requires_grad_()
    expected = plain(hidden.double(), doubles, bias.double(), target)
    assert expected.max() < 2e-5
    actual = exact.linear_cross_entropy(hidden, weight, bias, target, backend="triton")
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=0.0)
    ones = torch.ones(V)
    loss = exact.linear_cross_entropy_loss(hidden, weight, bias, target, ones, backend="triton")
    (truth,) = torch.autograd.grad(expected.sum(), doubles)
    for gradient in (*torch.autograd.grad(actual.sum(), weight), *torch.autograd.grad(loss, weight)):
        torch.testing.assert_close(gradient.double(), truth, rtol=1e-4, atol=0.0)


@for_triton
@pytest.mark.usefixtures("small")
def test_the_same_call_gives_the_same_bits():
    *tensors, target = operands()
    first, second = (
        torch.autograd.grad(exact.linear_cross_entropy_loss(*tensors, target, torch.ones(N), backend="triton"), tensors)
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


@for_triton
@pytest.mark.usefixtures("small")
def test_a_table_is_cast_by_pieces(monkeypatch, allocated):
    monkeypatch.setattr(gpu, "PIECE", 20 * D)
    hidden, weight, bias, target = operands()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        nll = exact.linear_cross_entropy(hidden, weight, bias, target, backend="triton")
        expected = plain(hidden, weight, bias, target)
    rounded = [x.detach().bfloat16().double() for x in (hidden, weight)]
    truth = plain(*rounded, bias.double(), target)
    assert (nll - truth).norm() <= 0.1 * (expected - truth).norm()
    assert len(allocated) > 4


@for_triton
def test_the_last_word_may_be_a_sure_target():
    """It stands again past the end of the table, where the tile ends later, and is no other word there."""
    hidden, weight = torch.full((3, 1), 30.0), torch.tensor([[0.0], [0.0], [30.0]], requires_grad=True)
    nll = exact.linear_cross_entropy(hidden, weight, None, torch.full((3,), 2), backend="triton")
    (gradient,) = torch.autograd.grad(nll.sum(), weight)
    assert not nll.any() and not gradient.any()


@for_triton
def test_rows_may_lie_apart():
    hidden, weight, bias, target = operands(width=2 * D)
    apart = [x.detach()[:, :D].requires_grad_() for x in (hidden, weight)]
    assert apart[1].stride() == (2 * D, 1)
    whole = [x.detach().contiguous().requires_grad_() for x in apart]
    results = [exact.linear_cross_entropy(*x, bias, target, backend="triton") for x in (apart, whole)]
    assert torch.equal(*results)
    slopes = [torch.autograd.grad(y.sum(), x) for x, y in zip((apart, whole), results, strict=True)]
    assert all(map(torch.equal, *slopes))


@pytest.mark.parametrize(("backend", "size"), [("eager", 1e-9), pytest.param("triton", 1e-5, marks=for_triton)])
def test_float16_does_not_lose_small_gradients(backend, size):
    """A weight of 1e-9, as that of a token in a large batch at a word's small probability, is zero in float16."""
    hidden, weight, bias, target = operands(torch.float16)
    weights = torch.full((N,), size)
    doubles = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    (truth,) = torch.autograd.grad((plain(*doubles, target) * weights).sum(), doubles[0])
    with torch.autocast(DEVICE.type, torch.float16):
        single = hidden.detach().float().requires_grad_()
        loss = exact.linear_cross_entropy_loss(single, weight, bias, target, weights, backend=backend)
    (gradient,) = torch.autograd.grad(loss, single)
    assert (gradient - truth).norm() <= 1e-2 * truth.norm()


# -- pairs of tokens and rows -----------------------------------------------------------------------------------------


@pytest.fixture
def few_rows(monkeypatch):
    """Tiles of 4 rows and 16 columns, and pieces of 3 pairs."""
    monkeypatch.setattr(tiles, "INTERPRETED", 4)
    monkeypatch.setattr(pairs_gpu, "PIECE", 3)
    for module in (pairs_gpu, path_gpu, gather_gpu):
        monkeypatch.setattr(module, "COLUMNS", 16)


def compare(step, sparse):
    results = []
    for backend in ("triton", "eager"):
        value, variables = step(backend)
        upstream = torch.linspace(-1, 2, value.numel(), dtype=torch.float64).reshape(value.shape)
        slopes = torch.autograd.grad(value, variables, upstream)
        assert slopes[1].is_sparse == slopes[2].is_sparse == sparse
        results.append([value, *(x.to_dense() for x in slopes)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@for_triton
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.usefixtures("few_rows")
def test_trees_by_many_tiles_and_pieces(sparse):
    tree = partition.huffman_tree(100 // np.arange(1, 12))
    variables = [torch.randn(*size).double().requires_grad_() for size in ((30, 37), (10, 37), (10,))]
    branches = [
        torch.from_numpy(x).to(DEVICE) for x in (tree.node_branch, tree.word_branch, partition.leaf_ranks(tree))
    ]
    depth, target = int(partition.depths(tree).max()), torch.randint(8, (30,))
    pace = torch.rand(10).double()

    def step(backend):
        options = {"sparse": sparse, "backend": backend}
        return path_nll(*variables, pace, *branches, depth, target, **options), variables

    compare(step, sparse)


@for_triton
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.usefixtures("few_rows")
def test_words_of_a_tokens_own_by_many_tiles_and_pieces(sparse):
    variables = [torch.randn(*size).double().requires_grad_() for size in ((5, 37), (9, 37), (9,))]
    ids = torch.randint(7, (5, 6))
    ids[:, 2] = 4  # a row that every token has
    compare(lambda backend: (gather_dot(*variables, ids, sparse=sparse, backend=backend), variables), sparse)


# -- groups of words --------------------------------------------------------------------------------------------------


@for_triton
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_groups_by_many_tiles(tokens, sparse, monkeypatch):
    """A group of one word, one that no token has, several tiles of tokens and of words of one group."""
    for name in ("INTERPRETED", "TILES"):
        tile = grouped_gpu.Tile(16, 16, 16)
        monkeypatch.setattr(grouped_gpu, name, tile if name == "INTERPRETED" else {4: tile, 8: tile})
    monkeypatch.setattr(grouped_gpu, "empty", lambda like, shape: like.new_full(shape, torch.nan))
    bound = torch.tensor([0, 1, 20, 21, 40, 57])
    variables = [torch.randn(*size).double().requires_grad_() for size in ((tokens, 21), (57, 21), (57,))]
    target = torch.cat([torch.randint(20, (tokens // 2,)), torch.randint(40, 57, (tokens - tokens // 2,))])

    def step(backend):
        return grouped_nll(*variables, bound, target, sparse=sparse, backend=backend), variables

    compare(step, sparse)


@for_triton
@pytest.mark.parametrize("score", [20.0, 60.0, 100.0])
def test_sure_words_of_a_group_keep_their_digits(score):
    """``1 - softmax`` is 0 in float32 from a difference of 17 on."""
    weight, bound = torch.tensor([[score], [0.0]], requires_grad=True), torch.tensor([0, 2])
    target = torch.tensor([0])
    nll = grouped_nll(torch.ones(1, 1), weight, torch.zeros(2), bound, target, sparse=False, backend="triton")
    (gradient,) = torch.autograd.grad(nll, weight)
    assert nll.item() == pytest.approx(np.exp(-score), rel=1e-5)
    assert gradient.flatten().tolist() == pytest.approx([-np.exp(-score), np.exp(-score)], rel=1e-5)


# -- where they run ---------------------------------------------------------------------------------------------------


def test_a_kernel_asked_for_where_it_cannot_run_says_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    *tensors, target = (x.cpu() for x in operands())
    with pytest.raises(BackendUnavailable, match=r"^backend='triton' cannot run on cpu: .*(pip install|CUDA device)"):
        exact.linear_cross_entropy(*tensors, target, backend="triton")


def test_nothing_takes_the_interpreter_unasked(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert Backends(triton=triton).choose("auto", "cpu") == "eager"


@for_triton
@pytest.mark.skipif(DEVICE.type == "cuda", reason="where there is a device, all tests compile")
def test_every_kernel_compiles_without_a_device():
    """The interpreter takes what the compiler refuses."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    ops = Path(tiles.__file__).parent
    assert {ops / line.split()[0] for line in done.stdout.splitlines()} == set(ops.rglob("*kernel.py"))


def test_importing_defines_no_kernel():
    code = "import sys, lvsoftmax.layer; print([m for m in sys.modules if m.endswith('.kernel') and 'lvsoftmax' in m])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
