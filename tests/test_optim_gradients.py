"""Gradients that optimisers are given: clipped, empty, out of order, apart in memory, forgotten, refused."""

import math

import pytest
import torch
from optimizers import OPTIMIZERS, ROWS, WIDTH, every_optimizer, gradient, some_ids, table
from torch import nn

from lvsoftmax import optim
from lvsoftmax.optim import SGD, clip_gradient_norm


def test_clipping_counts_duplicates_and_replaces_the_gradient_by_its_coalesced_form():
    sparse, dense, without = table(), table(torch.float64, WIDTH), table()
    ids = torch.tensor([3, 3, 7, 3])
    sparse.grad, dense.grad = gradient(0, ids, WIDTH), torch.full((WIDTH,), 2.0, dtype=torch.float64)
    expected = torch.cat([sparse.grad.to_dense().flatten(), dense.grad]).norm()
    before, dense_before = sparse.grad.to_dense(), dense.grad
    assert torch.equal(clip_gradient_norm([sparse, dense, without], math.inf), expected)
    assert sparse.grad.is_coalesced() and torch.equal(sparse.grad.to_dense(), before)
    norm = clip_gradient_norm([sparse, dense, without], float(expected) / 4)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(sparse.grad.to_dense(), before / 4)
    assert dense.grad is dense_before and sparse.grad.is_coalesced()
    torch.testing.assert_close(dense.grad, torch.full((WIDTH,), 0.5, dtype=torch.float64))
    assert without.grad is None


def test_clipping_leaves_small_gradients_alone_and_lets_broken_ones_be_seen():
    parameter = table()
    parameter.grad = torch.zeros_like(parameter)
    assert clip_gradient_norm([parameter], 1.0) == 0
    assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    parameter.grad[0, 0] = math.inf
    assert clip_gradient_norm([parameter], 1.0).isinf()
    assert not parameter.grad.isfinite().any()
    single = table(torch.float32)
    single.grad = torch.full_like(single, 1e30)  # finite, and their norm is not
    assert clip_gradient_norm([single], 1.0).isinf() and not single.grad.isfinite().any()
    assert clip_gradient_norm([table()], 1.0) == 0


@every_optimizer
def test_a_sparse_gradient_without_rows_changes_nothing(name):
    parameter = table()
    parameter.grad = gradient(0, torch.empty(0, dtype=torch.int64), WIDTH)
    assert clip_gradient_norm([parameter], 1.0) == 0
    OPTIMIZERS[name]([parameter]).step()
    assert torch.equal(parameter, table())


@every_optimizer
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, WIDTH), (0,), (ROWS, 0)], ids=str)
def test_a_parameter_without_numbers_has_nothing_to_update(name, shape, dtype, sparse):
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype))
    parameter.grad = torch.empty(shape, dtype=dtype).to_sparse(1) if sparse else torch.empty(shape, dtype=dtype)
    OPTIMIZERS[name]([parameter]).step()
    assert parameter.shape == shape


@every_optimizer
def test_the_rows_of_a_gradient_may_lie_apart_in_memory(name):
    first, second = (table(torch.float32) for _ in range(2))
    index, values = torch.tensor([[2, 0], [5, 0], [11, 0]]), torch.randn(3, WIDTH)
    for parameter, row in ((first, index[:, 0]), (second, index[:, 0].clone())):
        parameter.grad = torch.sparse_coo_tensor(row[None], values, parameter.shape, check_invariants=False)
        OPTIMIZERS[name]([parameter]).step()
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [[1, 3, 4], [3, 1, 4], [1, 3, 3], [2], []], ids=str)
def test_rows_that_are_in_order_are_not_sorted_again(rows, monkeypatch):
    """Autograd loses the flag; what it hands on is looked at, and coalesced only where it has to be."""
    values = torch.randn(len(rows), WIDTH, dtype=torch.float64)
    index = torch.tensor([rows], dtype=torch.int64)
    given = torch.sparse_coo_tensor(index, values, (ROWS, WIDTH), check_invariants=False)
    expected = given.coalesce()
    in_order = rows == sorted(set(rows))
    if in_order and not given.is_coalesced():  # as one row alone is
        monkeypatch.setattr(torch.Tensor, "coalesce", None)
    row, value = optim._rows(given)
    assert torch.equal(row, expected.indices()[0]) and torch.equal(value, expected.values())
    assert (value.data_ptr() == given._values().data_ptr()) == in_order or not rows


@pytest.mark.parametrize("sparse", [True, False])
def test_gradients_are_forgotten_or_set_to_zero(sparse):
    parameters = [table(), table(), table()]
    optimizer = SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], 0.1)
    for parameter in parameters[:2]:
        parameter.grad = gradient(0, some_ids(0), WIDTH) if sparse else torch.ones(ROWS, WIDTH, dtype=torch.float64)
    optimizer.zero_grad(set_to_none=False)
    for parameter in parameters[:2]:
        assert torch.equal(parameter.grad.to_dense(), torch.zeros(ROWS, WIDTH, dtype=torch.float64))
    assert parameters[2].grad is None
    optimizer.zero_grad()
    assert [parameter.grad for parameter in parameters] == [None] * 3


def test_a_gradient_sparse_in_its_columns_is_refused():
    parameter = table()
    parameter.grad = torch.randn(ROWS, WIDTH, dtype=torch.float64).to_sparse()
    with pytest.raises(ValueError, match="2 sparse dimensions"):
        SGD([parameter], 0.1).step()
