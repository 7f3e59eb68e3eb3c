"""Products between rows of two tables at listed pairs: what trees and draws that are a token's own are made of.

Letters: N tokens, D hidden, M rows of the table, P pairs of a token and a row, ordered by token; U distinct rows among
the pairs.

The pairs form a sparse N x M matrix. The products are a sampled product of two dense tables, the gradients are products
of that sparse matrix (or its transpose) with a table. An embedding bag is just such a product: a bag is a row, its
members' weights are the values, and its gradient by these weights is the sampled product. Its kernels read the rows
where they lie: there is no ``[P, D]`` temporary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lvsoftmax.ops import buffers
from lvsoftmax.ops.numerics import upcast

LARGE = 2**25  # bytes: from here on, the C library asks the system for every result anew


def bag_starts(size: Tensor) -> Tensor:
    """Return where each bag of these sizes starts."""
    return size.cumsum(0) - size


def pair_products(hidden_ND: Tensor, table_MD: Tensor, token_P: Tensor, row_P: Tensor, bag_N: Tensor) -> Tensor:
    """Return ``hidden[token] . table[row]`` of every pair; ``bag`` says where a token's pairs start."""
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        upcast(hidden_ND), upcast(table_MD), row_P, bag_N, token_P, mode=0
    )


def pair_gradients(
    gradient_P: Tensor,
    hidden_ND: Tensor,
    table_MD: Tensor,
    bias_M: Tensor | None,
    token_P: Tensor,
    row_P: Tensor,
    bag_N: Tensor,
    *,
    needed: Sequence[bool],
    sparse: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of hidden, table and bias of ``sum(gradient * (hidden[token] . table[row] + bias[row]))``.

    Args:
        gradient_P: the upstream gradient of each pair.
        hidden_ND: one table.
        table_MD: the other.
        bias_M: one number per row of it, or None.
        token_P: of each pair, the row of hidden; non-decreasing.
        row_P: of each pair, the row of the table.
        bag_N: where each token's pairs start.
        needed: which of the three are wanted.
        sparse: whether those of table and bias are coalesced COO tensors of U rows.
    """
    grad_hidden_ND = grad_table = grad_bias = None
    if needed[0]:
        grad_hidden_ND = _bag_sums(upcast(table_MD), row_P, bag_N, gradient_P).to(hidden_ND.dtype)
    if needed[1] or needed[2]:
        row_P, order_P = row_P.sort()
        token_P, gradient_P = token_P[order_P], gradient_P[order_P]
        if sparse:
            row_U, row_P, size_U = torch.unique_consecutive(row_P, return_inverse=True, return_counts=True)
            bag_U = bag_starts(size_U)
        else:
            row_U = None
            bag_U = torch.searchsorted(row_P, torch.arange(len(table_MD), device=row_P.device))
        if needed[1]:
            rows_UD = _row_sums(upcast(hidden_ND), token_P, bag_U, row_P, gradient_P).to(table_MD.dtype)
            grad_table = spread(rows_UD, row_U, table_MD)
        if needed[2] and bias_M is not None:
            one_N1 = gradient_P.new_ones(len(hidden_ND), 1)
            sum_U = _bag_sums(one_N1, token_P, bag_U, gradient_P).squeeze(1).to(bias_M.dtype)
            grad_bias = spread(sum_U, row_U, bias_M)
    return grad_hidden_ND, grad_table, grad_bias


def _bag_sums(table: Tensor, row_P: Tensor, bag: Tensor, factor_P: Tensor) -> Tensor:
    """Return the sum of ``factor * table[row]`` over the pairs of each bag, bags given by where they start."""
    return F.embedding_bag(row_P, table, bag, mode="sum", per_sample_weights=factor_P)


def _row_sums(table: Tensor, row_P: Tensor, bag: Tensor, bag_P: Tensor, factor_P: Tensor) -> Tensor:
    """Return what ``_bag_sums`` does, for many bags: a large result goes into recycled memory.

    The kernel of a bag takes fresh memory; that of a sparse product, a little slower, writes where it is told to.
    """
    bags, width = len(bag), table.shape[1]
    if not table.is_cpu or bags * width * table.element_size() < LARGE:
        return _bag_sums(table, row_P, bag, factor_P)
    factors = torch.sparse_coo_tensor(
        torch.stack([bag_P, row_P]), factor_P, (bags, len(table)), is_coalesced=True, check_invariants=False
    )
    result = buffers.empty_rows(table, bags, width).zero_()
    return torch.addmm(result, factors, table, out=result)


def spread(rows: Tensor, index_U: Tensor | None, like: Tensor) -> Tensor:
    """Return the gradient whose rows ``index`` are given, and others zero; all of them without ``index``."""
    if index_U is None:
        return rows
    options = {"device": rows.device, "is_coalesced": True, "check_invariants": False}
    return torch.sparse_coo_tensor(index_U[None], rows, like.shape, **options)
