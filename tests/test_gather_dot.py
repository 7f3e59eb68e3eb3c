import pytest
import torch

from lvsoftmax.ops.gather_dot import gather_dot

N, K, V, D = 5, 4, 11, 7
IDS = torch.tensor([[3, 3, 0, 10], [0, 1, 2, 3], [10, 10, 10, 10], [4, 0, 4, 9], [7, 3, 1, 0]])  # 5, 6 and 8 nowhere
for_every_table = pytest.mark.parametrize("with_bias", [True, False])


def operands(dtype=torch.float64, with_bias=True) -> list[torch.Tensor | None]:
    hidden, weight, bias = torch.randn(N, D), torch.randn(V, D), torch.randn(V)
    return [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)[: 2 + with_bias]] + [None] * (not with_bias)


@for_every_table
def test_it_gathers_from_the_full_product(with_bias):
    hidden, weight, bias = operands(with_bias=with_bias)
    expected = torch.nn.functional.linear(hidden, weight, bias).gather(1, IDS)
    torch.testing.assert_close(gather_dot(hidden, weight, bias, IDS, sparse=False), expected)


@pytest.mark.parametrize("sparse", [False, True])
@for_every_table
def test_gradients_are_those_of_the_full_product(with_bias, sparse):
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


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda *x: gather_dot(*x, IDS, sparse=False), operands())


def test_no_tokens():
    hidden, weight, bias = operands()
    value = gather_dot(hidden[:0], weight, bias, IDS[:0], sparse=True)
    value.sum().backward()
    assert value.shape == (0, K) and weight.grad.to_dense().any().item() is False


def test_half_precision_sums_in_single():
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

    torch.testing.assert_close(run(torch.compile(gather_dot, backend="aot_eager", fullgraph=True)), run(gather_dot))
