"""The ``triton`` backend: ``kernel.py``, and for the gradients the kernels of ``lvsoftmax/ops/pairs_gpu.py``.

Letters: N tokens, D hidden, V words, M = V - 1 nodes, L depth of the tree. The pairs of tokens and nodes are
``[L, N]``, with the number of no node above a path that is shorter; so the host waits for nothing but the number of
rows of a row-sparse gradient. A token whose target does not exist has the loss NaN, outside of the CPU.
"""

import torch
from torch import Tensor

from lvsoftmax.ops.inputs import check_vocabulary
from lvsoftmax.ops.once_differentiable import once_differentiable
from lvsoftmax.ops.pairs_gpu import table_gradients, token_sums
from lvsoftmax.ops.tiles import dense_rows, empty, next_power_of_2, ratio, sum_type, tile_size

TOKENS, COLUMNS = 4, 256
"""Of a tile: so many rows of nodes are on their way at once."""


@torch.compiler.disable()
def path_nll(
    hidden_ND: Tensor,
    weight_MD: Tensor,
    bias_M: Tensor,
    pace_M: Tensor,
    node_branch_M: Tensor,
    word_branch_V: Tensor,
    depth: int,
    target_N: Tensor,
    *,
    sparse: bool,
) -> Tensor:
    """As in ``reference.py``."""
    return _Walk.apply(hidden_ND, weight_MD, bias_M, pace_M, node_branch_M, word_branch_V, depth, target_N, sparse)


class _Walk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_MD, bias_M, pace_M, node_branch_M, word_branch_V, depth, target_N, sparse):
        from lvsoftmax.ops.path_nll import kernel

        tokens, width = hidden_ND.shape
        vocab = len(word_branch_V)
        check_vocabulary("target", target_N, vocab)
        nll_N, slope_LN = empty(hidden_ND, (tokens,)), empty(hidden_ND, (depth, tokens))
        node_LN = torch.full((depth, tokens), len(weight_MD), dtype=torch.int32, device=hidden_ND.device)
        ctx.save_for_backward(hidden_ND, weight_MD, bias_M, slope_LN, node_LN)
        ctx.sparse = sparse
        if tokens == 0:
            return nll_N
        hidden_ND, weight_MD = dense_rows(hidden_ND), dense_rows(weight_MD)
        vectors = [x.contiguous() for x in (bias_M, pace_M, node_branch_M, word_branch_V, target_N)]
        arguments = [hidden_ND, weight_MD, *vectors, nll_N, slope_LN, node_LN, tokens, width, vocab]
        tile = tile_size(tokens, hidden_ND, TOKENS)
        with torch.cuda.device_of(hidden_ND):
            kernel.walk[(ratio(tokens, tile),)](
                *arguments,
                **{"hidden_stride": hidden_ND.stride(0), "weight_stride": weight_MD.stride(0)},
                **{"SUM": sum_type(hidden_ND), "BT": tile, "BD": min(next_power_of_2(width), COLUMNS)},
            )
        return nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_N):
        hidden_ND, weight_MD, bias_M, slope_LN, node_LN = ctx.saved_tensors
        tokens, needed = len(hidden_ND), ctx.needs_input_grad
        factor_P, node_P = (slope_LN * upstream_N).flatten(), node_LN.flatten()
        to_hidden_ND = None
        if needed[0]:
            to_hidden_ND = token_sums(factor_P, node_P, weight_MD, tokens, (1, tokens)).to(hidden_ND.dtype)
        token_P = torch.arange(tokens, device=node_P.device).repeat(len(slope_LN))
        to_table = table_gradients(
            factor_P, token_P, node_P, hidden_ND, weight_MD, bias_M, needed=needed[1:3], sparse=ctx.sparse
        )
        return to_hidden_ND, *to_table, *[None] * 6
