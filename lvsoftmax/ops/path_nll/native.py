"""Tree log-likelihood by a compiled kernel for the CPU, see ``kernel.cpp``.

Letters: N tokens, D hidden, V words, M = V - 1 nodes, L depth of the tree, U distinct nodes on the targets' paths.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvsoftmax.ops.backends import CppLibrary
from lvsoftmax.ops.buffers import empty_rows, recycled
from lvsoftmax.ops.inputs import check_vocabulary
from lvsoftmax.ops.numerics import upcast
from lvsoftmax.ops.pairs import spread

LIBRARY = CppLibrary(Path(__file__).with_name("kernel.cpp"))

# As in kernel.cpp: tokens of a block, numbers in the two structures, tokens that go down a tree together.
BLOCK, PIECE, MET, LANES = 32, 6, 2, 128
C_TYPES = {torch.float32: "float", torch.float64: "double"}


@torch.compiler.disable()
def path_nll(
    hidden_ND: Tensor,
    weight_MD: Tensor,
    bias_M: Tensor,
    pace_M: Tensor,
    node_branch_M: Tensor,
    word_branch_V: Tensor,
    word_rank_V: Tensor,
    depth: int,
    target_N: Tensor,
    sparse: bool,
) -> Tensor:
    """Return the same as the reference, which describes the arguments."""
    return _Compiled.apply(
        hidden_ND, weight_MD, bias_M, pace_M, node_branch_M, word_branch_V, word_rank_V, depth, target_N, sparse
    )


def tree_log_prob(score_MN: Tensor, node_branch_M: Tensor, word_branch_V: Tensor) -> Tensor:
    """Return the same as the reference, without gradients."""
    score_MN = upcast(score_MN).contiguous()
    (nodes, tokens), threads = score_MN.shape, torch.get_num_threads()
    child = recycled((2 * nodes,), torch.int32)
    reached = recycled((threads, nodes, min(LANES, tokens)), score_MN.dtype)
    log_prob_VN = recycled((nodes + 1, tokens), score_MN.dtype)
    LIBRARY.call(
        f"log_prob_{C_TYPES[score_MN.dtype]}",
        *(node_branch_M, word_branch_V, nodes, score_MN, tokens, threads, child, reached, log_prob_VN),
    )
    return log_prob_VN.T.contiguous()  # whatever is done with it goes along the words


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_ND, weight_MD, bias_M, pace_M, node_branch_M, word_branch_V, word_rank_V, depth, target_N, sparse
    ):
        check_vocabulary("target", target_N, len(word_branch_V))
        x_ND = upcast(hidden_ND).contiguous()
        tokens, width = x_ND.shape
        order_N = torch.empty(tokens, dtype=torch.int32)
        piece, met = (recycled((tokens * depth, numbers), torch.int32) for numbers in (PIECE, MET))
        block_piece = torch.empty(-(-tokens // BLOCK) + 1, dtype=torch.int32)
        counts = torch.empty(2, dtype=torch.int64)
        plan = (order_N, piece, met, block_piece)
        tree = (node_branch_M, word_branch_V, word_rank_V, depth)
        work = recycled((2 * tokens + 5 * depth + 1,), torch.int32)
        LIBRARY.call("plan", *tree, target_N.contiguous(), tokens, *plan, work, counts)
        ctx.met_nodes, pairs = counts.tolist()
        slope_P, nll_N = x_ND.new_empty(pairs), x_ND.new_empty(tokens)
        threads, room = torch.get_num_threads(), BLOCK * depth
        work = recycled((threads, 3, room), x_ND.dtype)
        parameters = (x.to(x_ND.dtype).contiguous() for x in (weight_MD, bias_M, pace_M))
        LIBRARY.call(
            f"forward_{C_TYPES[x_ND.dtype]}",
            *(*plan, tokens, x_ND, *parameters, width, room, threads, work, slope_P, nll_N),
        )
        ctx.save_for_backward(hidden_ND, weight_MD, bias_M, slope_P, *plan)
        ctx.sparse = sparse
        return nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_N):
        hidden_ND, weight_MD, bias_M, slope_P, *plan = ctx.saved_tensors
        x_ND = upcast(hidden_ND).contiguous()
        tokens, width = x_ND.shape
        if ctx.sparse:
            node_U = torch.empty(ctx.met_nodes, dtype=torch.int64)
            LIBRARY.call("numbers_met", plan[2], ctx.met_nodes, node_U)
            rows = ctx.met_nodes
        else:
            node_U, rows = None, len(weight_MD)
        shapes = ((tokens, width), (rows, width), (rows, 1))
        found = [
            empty_rows(x_ND, *shape) if needed else None
            for shape, needed in zip(shapes, ctx.needs_input_grad, strict=False)
        ]
        if not ctx.sparse:  # rows of nodes that no path meets
            for gradient in found[1:]:
                if gradient is not None:
                    gradient.zero_()
        shared = recycled((ctx.met_nodes,), torch.uint8)
        LIBRARY.call(
            f"backward_{C_TYPES[x_ND.dtype]}",
            *(*plan, tokens, x_ND, weight_MD.to(x_ND.dtype).contiguous(), slope_P, upstream_N.contiguous()),
            *(width, ctx.met_nodes, int(not ctx.sparse), torch.get_num_threads(), shared, *found),
        )
        to_hidden_ND, to_weight, to_bias = (
            None if gradient is None else gradient.view(len(gradient), *like.shape[1:]).to(like.dtype)
            for gradient, like in zip(found, (hidden_ND, weight_MD, bias_M), strict=True)
        )
        if ctx.sparse:
            to_weight = None if to_weight is None else spread(to_weight, node_U, weight_MD)
            to_bias = None if to_bias is None else spread(to_bias, node_U, bias_M)
        return to_hidden_ND, to_weight, to_bias, *[None] * 7
