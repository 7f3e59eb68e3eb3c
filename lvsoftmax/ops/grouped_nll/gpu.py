"""The ``triton`` backend: ``kernel.py``, tokens of one group against the words of that group.

Letters: N tokens, D hidden, V words, G groups, S words of the largest group, U words of the groups that occur, T tiles.
The host waits for one pair of numbers, S and U. A tile of tokens, or of words, belongs to one group; there are at most
so many as a tile's size gives, and one more for each group. Programs without a tile do nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lvsoftmax.ops.numerics import softplus
from lvsoftmax.ops.once_differentiable import once_differentiable
from lvsoftmax.ops.pairs import spread
from lvsoftmax.ops.tiles import dense_rows, empty, ratio, sum_type


class Tile(NamedTuple):
    """Tokens, words and columns of one tile."""

    tokens: int
    words: int
    columns: int


TILES = {4: Tile(32, 64, 64), 8: Tile(16, 32, 32)}
"""By the bytes of a number; groups have few tokens and words, or many groups would mostly be empty tiles."""

INTERPRETED = Tile(128, 128, 128)
"""In Triton's interpreter, which spends its time on programs and not on numbers."""


@torch.compiler.disable()
def grouped_nll(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, bound_G: Tensor, target_N: Tensor, *, sparse: bool
) -> Tensor:
    """As in ``reference.py``."""
    return _Grouped.apply(hidden_ND, weight_VD, bias_V, bound_G, target_N, sparse)


class _Tiles(NamedTuple):
    """Of each tile its tokens, in sorted order, and its words: from the first to before the last."""

    first_token_T: Tensor
    last_token_T: Tensor
    first_word_T: Tensor
    last_word_T: Tensor
    group_T: Tensor


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, bound_G, target_N, sparse):
        from lvsoftmax.ops.grouped_nll import kernel

        ctx.sparse = sparse
        group_N, order_N = torch.bucketize(target_N, bound_G[1:-1], right=True).sort(stable=True)
        groups = len(bound_G) - 1
        start_G = torch.searchsorted(group_N, torch.arange(groups + 1, device=group_N.device))
        token_G, word_G = start_G[1:] - start_G[:-1], bound_G[1:] - bound_G[:-1]
        met_G = torch.where(token_G > 0, word_G, 0)
        largest, ctx.rows = torch.stack([met_G.max(), met_G.sum()]).tolist()
        run = _Runner(hidden_ND)
        others_N, target_score_N = empty(hidden_ND, target_N.shape), empty(hidden_ND, target_N.shape)
        score_NS = empty(hidden_ND, (len(target_N), largest))
        tiles = _tiles(start_G, bound_G, token_G, run.tile.tokens, len(target_N), by_tokens=True)
        arguments = [dense_rows(hidden_ND), dense_rows(weight_VD), bias_V.contiguous(), target_N.contiguous(), order_N]
        arguments += [*tiles[:4], score_NS, others_N, target_score_N, hidden_ND.shape[1], largest]
        strides = {"hidden_stride": arguments[0].stride(0), "weight_stride": arguments[1].stride(0)}
        run(kernel.scores, len(tiles.group_T) if len(target_N) else 0, arguments, strides)
        ctx.save_for_backward(
            *(hidden_ND, weight_VD, bias_V, target_N, order_N, others_N, target_score_N, score_NS),
            *(start_G, bound_G, token_G, met_G, *tiles),
        )
        return softplus(others_N - target_score_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_N):
        from lvsoftmax.ops.grouped_nll import kernel

        hidden_ND, weight_VD, bias_V, target_N, order_N, others_N, target_score_N, score_NS, *saved = ctx.saved_tensors
        start_G, bound_G, token_G, met_G, *tiles = saved
        needed, run, (tokens, width) = ctx.needs_input_grad, _Runner(hidden_ND), hidden_ND.shape
        # 1 - p of the target to the last digit, as in README.md, (3).
        pull_N = upstream_N * torch.sigmoid(others_N - target_score_N)
        known = [score_NS, others_N.clamp(min=torch.finfo(others_N.dtype).min), pull_N]
        sizes = [width, score_NS.shape[1]]
        target_N, chunks = target_N.contiguous(), ratio(width, run.tile.columns)
        to_hidden_ND = to_weight = to_bias = None
        if needed[0]:
            result_ND, table_VD = empty(hidden_ND, (tokens, width)), dense_rows(weight_VD)
            arguments = [table_VD, target_N, order_N, *tiles[:4], *known, result_ND, *sizes]
            programs = len(tiles[0]) * chunks if tokens else 0
            run(kernel.to_hidden, programs, arguments, {"weight_stride": table_VD.stride(0)})
            to_hidden_ND = result_ND.to(hidden_ND.dtype)
        if needed[1] or needed[2]:
            rows = ctx.rows if ctx.sparse else len(weight_VD)
            result, result_bias = empty(hidden_ND, (rows, width)), empty(hidden_ND, (rows,))
            row_G, index_U = bound_G[:-1], None
            if ctx.sparse:
                end_G = met_G.cumsum(0)
                row_G = end_G - met_G
                place_U = torch.arange(rows, device=end_G.device)
                group_U = torch.searchsorted(end_G, place_U, right=True)
                index_U = bound_G[group_U] + place_U - row_G[group_U]
            else:  # words of groups that do not occur
                result.zero_()
                result_bias.zero_()
            words = _tiles(start_G, bound_G, token_G, run.tile.words, ctx.rows, by_tokens=False)
            begin_T = bound_G[words.group_T]
            row_T = row_G[words.group_T] + words.first_word_T - begin_T
            source_ND = dense_rows(hidden_ND)
            arguments = [source_ND, target_N, order_N, *words[:4], begin_T, row_T, *known, result, result_bias, *sizes]
            programs = len(begin_T) * chunks if tokens else 0
            run(kernel.to_table, programs, arguments, {"hidden_stride": source_ND.stride(0)})
            to_weight = spread(result.to(weight_VD.dtype), index_U, weight_VD) if needed[1] else None
            to_bias = spread(result_bias.to(bias_V.dtype), index_U, bias_V) if needed[2] else None
        return to_hidden_ND, to_weight, to_bias, None, None, None


def _tiles(start_G: Tensor, bound_G: Tensor, token_G: Tensor, size: int, entries: int, *, by_tokens: bool) -> _Tiles:
    """Cut the tokens, or the words, of every group that occurs into tiles of ``size``; there are ``entries`` in all."""
    groups = len(token_G)
    whole_G = token_G if by_tokens else torch.where(token_G > 0, bound_G[1:] - bound_G[:-1], 0)
    tiles_G = (whole_G + size - 1) // size
    end_G = tiles_G.cumsum(0)
    tile_T = torch.arange(entries // size + min(groups, entries), device=token_G.device)
    group_T = torch.searchsorted(end_G, tile_T, right=True)
    used_T = group_T < groups
    group_T = group_T.clamp(max=groups - 1)
    offset_T = (tile_T - (end_G - tiles_G)[group_T]) * size
    token_T, word_T = start_G[group_T], bound_G[group_T]
    last_token_T, last_word_T = start_G[group_T + 1], bound_G[group_T + 1]
    if by_tokens:
        token_T = token_T + offset_T
        last_token_T = torch.minimum(last_token_T, token_T + size)
    else:
        word_T = word_T + offset_T
        last_word_T = torch.minimum(last_word_T, word_T + size)
    # What is no tile has neither tokens nor words.
    last_token_T, last_word_T = torch.where(used_T, last_token_T, token_T), torch.where(used_T, last_word_T, word_T)
    return _Tiles(token_T, last_token_T, word_T, last_word_T, group_T)


class _Runner:
    """Runs a kernel with the options that follow from the precision of sums, in which products are taken too."""

    def __init__(self, like: Tensor) -> None:
        self.device = like
        single = like.dtype != torch.float64
        self.tile = (TILES[4] if single else TILES[8]) if like.is_cuda else INTERPRETED
        exact = torch.get_float32_matmul_precision() == "highest"
        self.options = {
            "SUM": sum_type(like),
            "PRECISION": "ieee" if not single else "tf32x3" if exact else "tf32",
            "BN": self.tile.tokens,
            "BV": self.tile.words,
            "BD": self.tile.columns,
        }

    def __call__(self, kernel, programs: int, arguments: list, strides: dict[str, int]) -> None:
        if programs:
            with torch.cuda.device_of(self.device):
                kernel[(programs,)](*arguments, **strides, **self.options)
