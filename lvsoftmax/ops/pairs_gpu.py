"""What ``pairs.py`` has for gradients, by the Triton kernels of ``pairs_kernel.py``.

Letters: N tokens, D hidden, M rows of the table, P pairs of a token and a row, S the same sorted, U distinct rows among
them, Q pieces of the rows' pairs. Pairs whose row does not exist are none. Triton is imported by the first call.

The pairs are sorted by row once. A row's are cut into pieces of ``PIECE``, so that a row that all tokens share, as the
root of a tree is, takes no longer than any other; a second kernel adds the pieces up. There is no atomic operation:
every sum has one order, and the same call gives the same bits. Sizes that depend on data are bounded instead of asked
for, but for one: a row-sparse gradient needs U, for which the host waits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lvsoftmax.ops.pairs import spread
from lvsoftmax.ops.tiles import dense_rows, empty, next_power_of_2, ratio, sum_type, tile_size

PIECE = 32
"""Pairs of a row that one program adds up."""

ROWS, COLUMNS = 8, 128
"""Of a tile: so many rows are on their way at once; a warp reads 128 numbers in float32 in one go."""


def token_sums(factor_P: Tensor, row_P: Tensor, table_MD: Tensor, tokens: int, strides: tuple[int, int]) -> Tensor:
    """Return the sum of ``factor * table[row]`` over each token's pairs, ``[N, D]`` in the precision of ``factor``.

    Pair ``k`` of token ``n`` has the place ``n * strides[0] + k * strides[1]``.
    """
    from lvsoftmax.ops import pairs_kernel

    (rows, width), pairs = table_MD.shape, factor_P.numel()
    result_ND = empty(factor_P, (tokens, width))
    if tokens == 0:
        return result_ND
    table_MD = dense_rows(table_MD)
    tile, columns = tile_size(tokens, factor_P, ROWS), min(next_power_of_2(width), COLUMNS)
    with torch.cuda.device_of(table_MD):
        pairs_kernel.token_sums[(ratio(tokens, tile) * ratio(width, columns),)](
            *(factor_P, row_P, table_MD, result_ND, tokens, width, pairs // tokens, rows, *strides),
            **{"table_stride": table_MD.stride(0), "SUM": sum_type(factor_P), "BT": tile, "BD": columns},
        )
    return result_ND


def table_gradients(
    factor_P: Tensor,
    token_P: Tensor,
    row_P: Tensor,
    hidden_ND: Tensor,
    table_MD: Tensor,
    bias_M: Tensor | None,
    *,
    needed: Sequence[bool],
    sparse: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of table and bias of ``sum(factor * (hidden[token] . table[row] + bias[row]))``.

    Args:
        factor_P: the upstream gradient of each pair.
        token_P: the row of hidden of each pair.
        row_P: the row of the table of each pair.
        hidden_ND: one table.
        table_MD: the other.
        bias_M: one number per row of it, or None.
        needed: which of the two are wanted.
        sparse: whether they are coalesced COO tensors of U rows.
    """
    if not (needed[0] or (needed[1] and bias_M is not None)):
        return None, None
    rows_UD, bias_U, index_U = table_sums(factor_P, token_P, row_P, hidden_ND, len(table_MD), sparse)
    to_table = spread(rows_UD.to(table_MD.dtype), index_U, table_MD) if needed[0] else None
    if not needed[1] or bias_M is None:
        return to_table, None
    return to_table, spread(bias_U.to(bias_M.dtype), index_U, bias_M)


class _Pieces(NamedTuple):
    """How the sorted pairs are shared out; arrays are as long as they can become, with nothing in what is left over."""

    begin_Q: Tensor
    end_Q: Tensor
    place_Q: Tensor  # where the piece's sums go, see the kernel
    pieces_U: Tensor
    share_U: Tensor  # where a row's pieces begin among the shares
    place_U: Tensor
    shares: int
    row_U: Tensor | None


def table_sums(
    factor_P: Tensor, token_P: Tensor, row_P: Tensor, hidden_ND: Tensor, rows: int, sparse: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the sums of ``factor * hidden[token]`` and of ``factor`` by row: ``[M, D]`` and ``[M]``.

    With ``sparse`` they are those of the U rows that occur, and the third result says which rows these are.
    """
    from lvsoftmax.ops import pairs_kernel

    width, hidden_ND = hidden_ND.shape[1], dense_rows(hidden_ND)
    row_S, order_S = torch.where((row_P < 0) | (row_P >= rows), rows, row_P).sort(stable=True)
    plan = _share_out(row_S, rows, sparse)
    count = rows if plan.row_U is None else len(plan.row_U)
    result, result_bias = empty(factor_P, (count, width)), empty(factor_P, (count,))
    if plan.row_U is None:
        result.zero_()
        result_bias.zero_()
    if len(plan.begin_Q) == 0:
        return result, result_bias, plan.row_U
    partial, partial_bias = empty(factor_P, (plan.shares, width)), empty(factor_P, (plan.shares,))
    columns = min(next_power_of_2(width), COLUMNS)
    chunks, pieces, most = ratio(width, columns), len(plan.begin_Q), len(plan.pieces_U)
    options = {"SUM": sum_type(factor_P), "BD": columns, "BQ": tile_size(pieces, factor_P, ROWS)}
    with torch.cuda.device_of(hidden_ND):
        pairs_kernel.piece_sums[(ratio(pieces, options["BQ"]) * chunks,)](
            *(factor_P[order_S], token_P[order_S], hidden_ND, plan.begin_Q, plan.end_Q, plan.place_Q),
            *(result, result_bias, partial, partial_bias, pieces, width, hidden_ND.stride(0)),
            **options,
        )
        if plan.shares:
            pairs_kernel.join_pieces[(ratio(most, options["BQ"]) * chunks,)](
                *(partial, partial_bias, plan.share_U, plan.pieces_U, plan.place_U, result, result_bias, most, width),
                **options,
            )
    return result, result_bias, plan.row_U


def _share_out(row_S: Tensor, rows: int, sparse: bool) -> _Pieces:
    """Cut the pairs of every row into pieces. With ``sparse`` rows are counted, which the host waits for."""
    pairs, device = len(row_S), row_S.device
    position_S = torch.arange(pairs, device=device)
    begins_S = row_S < rows
    begins_S[1:] &= row_S[1:] != row_S[:-1]
    number_S = begins_S.cumsum(0)
    most = min(pairs, rows)
    if sparse:
        most = int(number_S[-1]) if pairs else 0
    # Beginnings go to their number, all else to a place beyond the end; what no row begins is where the pairs end.
    start_U = (row_S < rows).sum().expand(most + 2).clone()
    start_U.scatter_(0, torch.where(begins_S, number_S - 1, most + 1), position_S)
    start_U, end_U = start_U[:most], start_U[1 : most + 1]
    row_U = row_S[start_U.clamp(max=max(pairs - 1, 0))].long()
    place_U = torch.arange(most, device=device) if sparse else row_U
    pieces_U = (end_U - start_U + PIECE - 1) // PIECE
    share_U = torch.where(pieces_U > 1, pieces_U, 0).cumsum(0)
    share_U -= torch.where(pieces_U > 1, pieces_U, 0)
    last_U = pieces_U.cumsum(0)
    piece_Q = torch.arange(most + pairs // PIECE if most else 0, device=device)
    segment_Q = torch.searchsorted(last_U, piece_Q, right=True)
    used_Q = segment_Q < most
    segment_Q = segment_Q.clamp(max=max(most - 1, 0))
    nth_Q = piece_Q - (last_U - pieces_U)[segment_Q]
    begin_Q = torch.where(used_Q, start_U[segment_Q] + nth_Q * PIECE, 0)
    end_Q = torch.where(used_Q, torch.minimum(begin_Q + PIECE, end_U[segment_Q]), 0)
    place_Q = torch.where(pieces_U[segment_Q] > 1, -1 - share_U[segment_Q] - nth_Q, place_U[segment_Q])
    # A row of more than one piece has fewer than twice its pairs / PIECE.
    shares = 2 * pairs // PIECE
    return _Pieces(begin_Q, end_Q, place_Q, pieces_U, share_U, place_U, shares, row_U if sparse else None)
