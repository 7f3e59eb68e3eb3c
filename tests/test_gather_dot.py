import functools

import pytest
import torch

from lvsoftmax.cost import count_work
from lvsoftmax.ops import buffers
from lvsoftmax.ops import gather_dot as package
from lvsoftmax.ops.gather_dot import BACKENDS

N, K, V, D = 5, 4, 11, 7
IDS = torch.tensor([[3, 3, 0, 10], [0, 1, 2, 3], [10, 10, 10, 10], [4, 0, 4, 9], [7, 3, 1, 0]])  # 5, 6 and 8 nowhere
OBSTACLES = {name: obstacle(torch.device("cpu")) for name, obstacle in BACKENDS.obstacles.items()}
for_every_backend = pytest.mark.parametrize(
    "gather_dot",
    [
        pytest.param(
            functools.partial(package.gather_dot, backend=name),
            id=name,
            marks=pytest.mark.skipif(reason is not None, reason=str(reason)),
        )
        for name, reason in OBSTACLES.items()
    ],
)
for_every_table = pytest.mark.parametrize("with_bias", [True, False])


def operands(dtype=torch.float64, with_bias=True) -> list[torch.Tensor | None]:
    hidden, weight, bias = torch.randn(N, D), torch.randn(V, D), torch.randn(V)
    return [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)[: 2 + with_bias]] + [None] * (not with_bias)


@for_every_backend
@for_every_table
def test_it_gathers_from_the_full_product(gather_dot, with_bias):
    hidden, weight, bias = operands(with_bias=with_bias)
    expected = torch.nn.functional.linear(hidden, weight, bias).gather(1, IDS)
    torch.testing.assert_close(gather_dot(hidden, weight, bias, IDS, sparse=False), expected)


@for_every_backend
@pytest.mark.parametrize("sparse", [False, True])
@for_every_table
def test_gradients_are_those_of_the_full_product(gather_dot, with_bias, sparse):
    hidden, weight, bias = operands(with_bias=with_bias)
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    upstream = torch.randn(N, K, dtype=torch.float64)
    expected = torch.autograd.grad(torch.nn.functional.linear(hidden, weight, bias).gather(1, IDS), inputs, upstream)
    actual = torch.autograd.grad(gather_dot(hidden, weight, bias, IDS, sparse=sparse), inputs, upstream)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.to_dense(), other)
    for gradient in actual[1:]:
        assert gradient.is_sparse == sparse
        if sparse:
            assert gradient.is_coalesced() and gradient.indices()[0].tolist() == sorted(set(IDS.flatten().tolist()))


@for_every_backend
def test_gradcheck(gather_dot):
    hidden, weight, bias = (x.detach() for x in operands())
    few = [x.clone().requires_grad_() for x in (hidden[:2, :2], weight[:4, :2], bias[:4])]
    assert torch.autograd.gradcheck(lambda *x: gather_dot(*x, IDS[:2] % 4, sparse=False), few)


@for_every_backend
def test_no_tokens(gather_dot):
    hidden, weight, bias = operands()
    value = gather_dot(hidden[:0], weight, bias, IDS[:0], sparse=True)
    value.sum().backward()
    assert value.shape == (0, K) and weight.grad.to_dense().any().item() is False


@for_every_backend
@pytest.mark.parametrize("sparse", [False, True])
def test_tokens_without_words(gather_dot, sparse):
    """Large enough for memory that was used before, and is not zero."""
    hidden, weight = torch.randn(300, 1024, requires_grad=True), torch.randn(V, 1024, requires_grad=True)
    buffers.recycled(hidden.shape, hidden.dtype).fill_(7)
    value = gather_dot(hidden, weight, None, torch.empty(300, 0, dtype=torch.long), sparse=sparse)
    value.sum().backward()
    assert value.shape == (300, 0) and not hidden.grad.any() and not weight.grad.to_dense().any()


@for_every_backend
def test_half_precision_sums_in_single(gather_dot):
    hidden, weight, bias = operands(torch.bfloat16)
    value = gather_dot(hidden, weight, bias, IDS, sparse=False)
    value.sum().backward()
    expected = torch.nn.functional.linear(hidden.float(), weight.float(), bias.float()).gather(1, IDS)
    assert value.dtype == torch.float32 and weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(value, expected)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own habits
@for_every_table
def test_traced_it_is_the_same(with_bias):
    torch.compiler.reset()
    inputs = operands(with_bias=with_bias)
    wanted = [x for x in inputs if x is not None]

    def run(function):
        value = function(*inputs, IDS, sparse=False)
        return value, torch.autograd.grad(value.square().sum(), wanted)

    traced = torch.compile(package.gather_dot, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(traced), run(package.gather_dot))


@for_every_backend
@pytest.mark.parametrize("words", [1, 3, 4, 9, 130])
@pytest.mark.parametrize("width", [1, 5, 64])
def test_awkward_sizes(gather_dot, words, width):
    source = torch.Generator().manual_seed(words)
    hidden, weight = (torch.randn(size, width, generator=source, requires_grad=True) for size in (6, 40))
    bias = torch.randn(40, generator=source, requires_grad=True)
    ids, upstream = torch.randint(40, (6, words), generator=source), torch.randn(6, words, generator=source)
    value = gather_dot(hidden, weight, bias, ids, sparse=True)
    expected = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double()).gather(1, ids)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    actual = torch.autograd.grad(value, (hidden, weight, bias), upstream)
    wanted = torch.autograd.grad(expected, (hidden, weight, bias), upstream.double())
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one.to_dense(), other, rtol=1e-4, atol=1e-4)


@for_every_backend
def test_only_gradients_that_are_asked_for(gather_dot):
    for wanted in range(3):
        inputs = operands()
        for i, operand in enumerate(inputs):
            operand.requires_grad_(i == wanted)
        gather_dot(*inputs, IDS, sparse=True).sum().backward()
        assert [x.grad is not None for x in inputs] == [i == wanted for i in range(3)]


@for_every_backend
def test_operations_are_counted(gather_dot):
    hidden, weight, bias = operands(torch.float32)
    assert count_work(lambda: gather_dot(hidden, weight, bias, IDS, sparse=True)).flops == 2 * N * K * D
    value = gather_dot(hidden, weight, bias, IDS, sparse=True).sum()
    backward = count_work(value.backward).flops
    assert 4 * N * K * D <= backward <= 4 * N * K * D + 2 * N * K  # plain PyTorch takes a product for the bias


def test_threads_change_nothing():
    if OBSTACLES["cpp"]:
        pytest.skip(OBSTACLES["cpp"])
    source = torch.Generator().manual_seed(0)
    inputs = [torch.randn(300, 32, generator=source, requires_grad=True) for _ in range(2)]
    ids = torch.randint(300, (300, 20), generator=source)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        value = package.gather_dot(*inputs, None, ids, sparse=False, backend="cpp")
        results.append((value, *torch.autograd.grad(value.square().sum(), inputs)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("word", [-1, V])
def test_words_that_there_are_not_are_an_error(word):
    if OBSTACLES["cpp"]:
        pytest.skip(OBSTACLES["cpp"])
    hidden, weight, bias = operands()
    with pytest.raises(ValueError, match=rf"^ids has ids from {word} to {word}: they must be in \[0, {V}\); leave out"):
        package.gather_dot(hidden, weight, bias, torch.full((N, K), word), sparse=True, backend="cpp")
