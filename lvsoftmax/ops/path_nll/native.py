"""Tree log-likelihood by a compiled kernel for the CPU, see ``kernel.cpp``.

Letters: N tokens, D hidden, V words, M = V - 1 nodes, L depth of the tree, U distinct nodes on the targets' paths.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lvsoftmax.ops.backends import CppLibrary
from lvsoftmax.ops.buffers import empty_rows, recycled
from lvsoftmax.ops.gradients_in_forward import GradientsInForward
from lvsoftmax.ops.inputs import check_vocabulary
from lvsoftmax.ops.numerics import upcast
from lvsoftmax.ops.once_differentiable import once_differentiable
from lvsoftmax.ops.pairs import spread

LIBRARY = CppLibrary(Path(__file__).with_name("kernel.cpp"))

# As in kernel.cpp: tokens of a block, numbers in the two structures, tokens that go down a tree together, and up.
BLOCK, PIECE, MET, LANES, CLIMB = 24, 6, 2, 128, 16
C_TYPES = {torch.float32: "float", torch.float64: "double"}

Tree = tuple[Tensor, Tensor, Tensor, int]
"""Branches of nodes and words, ranks of words, depth."""


@torch.compiler.disable()
def path_nll(
    hidden_ND: Tensor,
    weight_MD: Tensor,
    bias_M: Tensor,
    pace_M: Tensor,
    tree: Tree,
    target_N: Tensor,
    sparse: bool,
) -> Tensor:
    """Return the same as the reference, which describes the arguments."""
    return _PerToken.apply(hidden_ND, weight_MD, bias_M, pace_M, tree, target_N, sparse)


@torch.compiler.disable()
def path_nll_loss(
    hidden_ND: Tensor,
    weight_MD: Tensor,
    bias_M: Tensor,
    pace_M: Tensor,
    tree: Tree,
    target_N: Tensor,
    token_weight_N: Tensor,
    sparse: bool,
) -> Tensor:
    """Return ``sum(token_weight * path_nll)``, to be differentiated at most once: the gradients are made on the way."""
    return _WeightedSum.apply(hidden_ND, weight_MD, bias_M, token_weight_N, pace_M, tree, target_N, sparse)


def tree_log_prob(score_MN: Tensor, node_branch_M: Tensor, word_branch_V: Tensor) -> Tensor:
    """Return the same as the reference, without gradients."""
    score_MN = upcast(score_MN).contiguous()
    nodes, tokens = score_MN.shape
    threads = max(min(torch.get_num_threads(), -(-tokens // LANES)), 1)  # each has room for its tokens
    child = recycled((2 * nodes,), torch.int32)
    reached = recycled((threads, nodes, min(LANES, tokens)), score_MN.dtype)
    log_prob_VN = recycled((nodes + 1, tokens), score_MN.dtype)
    LIBRARY.call(
        f"log_prob_{C_TYPES[score_MN.dtype]}",
        *(node_branch_M, word_branch_V, nodes, score_MN, tokens, threads, child, reached, log_prob_VN),
    )
    return log_prob_VN.T.contiguous()  # whatever is done with it goes along the words


class _Plan(NamedTuple):
    """What ``plan`` of ``kernel.cpp`` finds out about the paths of a batch."""

    order_N: Tensor
    piece: Tensor
    met: Tensor
    block_piece: Tensor
    met_nodes: int
    pairs: int
    room: int

    @classmethod
    def of(cls, tree: Tree, target_N: Tensor) -> "_Plan":
        """Sort the tokens, and find the pieces and the nodes met."""
        depth, tokens = tree[-1], len(target_N)
        check_vocabulary("target", target_N, len(tree[1]))
        order_N = torch.empty(tokens, dtype=torch.int32, device="cpu")
        piece, met = (recycled((tokens * depth, numbers), torch.int32) for numbers in (PIECE, MET))
        block_piece = torch.empty(-(-tokens // BLOCK) + 1, dtype=torch.int32, device="cpu")
        counts = torch.empty(2, dtype=torch.int64, device="cpu")
        work = recycled((2 * tokens + (CLIMB + 5) * depth + 1,), torch.int32)
        LIBRARY.call("plan", *tree, target_N.contiguous(), tokens, order_N, piece, met, block_piece, work, counts)
        met_nodes, pairs = counts.tolist()
        return cls(order_N, piece, met, block_piece, met_nodes, pairs, BLOCK * depth)

    @property
    def arguments(self) -> tuple[Tensor | int, ...]:
        """What functions of the kernel take."""
        return (*self[:4], len(self.order_N))


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_MD, bias_M, pace_M, tree, target_N, sparse):
        plan = _Plan.of(tree, target_N)
        ctx.sizes, ctx.sparse = plan[4:], sparse
        x_ND = upcast(hidden_ND).contiguous()
        slope_P, nll_N = x_ND.new_empty(plan.pairs), x_ND.new_empty(len(x_ND))
        threads = torch.get_num_threads()
        work = recycled((threads, 3, plan.room), x_ND.dtype)
        parameters = (x.to(x_ND.dtype).contiguous() for x in (weight_MD, bias_M, pace_M))
        LIBRARY.call(
            f"forward_{C_TYPES[x_ND.dtype]}",
            *(*plan.arguments, x_ND, *parameters, x_ND.shape[1], plan.room, threads, work, slope_P, nll_N),
        )
        ctx.save_for_backward(hidden_ND, weight_MD, bias_M, slope_P, *plan[:4])
        return nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_N):
        hidden_ND, weight_MD, bias_M, slope_P, *plan = ctx.saved_tensors
        operands, needed = (hidden_ND, weight_MD, bias_M, slope_P, upstream_N), ctx.needs_input_grad[:3]
        return *_gradients("backward", _Plan(*plan, *ctx.sizes), *operands, needed, ctx.sparse), *[None] * 4


class _WeightedSum(GradientsInForward):
    @staticmethod
    def forward(ctx, hidden_ND, weight_MD, bias_M, token_weight_N, pace_M, tree, target_N, sparse):
        plan = _Plan.of(tree, target_N)
        *needed, weighs = ctx.needs_input_grad[:4]
        dtype = upcast(hidden_ND).dtype
        slope_P, nll_N = (hidden_ND.new_empty(size, dtype=dtype) for size in (plan.pairs, len(hidden_ND)))
        token_weight_N = token_weight_N.to(dtype)
        work = recycled((torch.get_num_threads(), 3, plan.room), dtype)
        offsets = (x.to(dtype).contiguous() for x in (bias_M, pace_M))
        gradients = _gradients(
            *("weighted", plan, hidden_ND, weight_MD, bias_M, slope_P, token_weight_N, needed, sparse),
            *(*offsets, plan.room, work, nll_N),
        )
        ctx.gradients = (*gradients, nll_N if weighs else None)
        return (token_weight_N * nll_N).sum()


def _gradients(
    function: str,
    plan: _Plan,
    hidden_ND: Tensor,
    weight_MD: Tensor,
    bias_M: Tensor,
    slope_P: Tensor,
    upstream_N: Tensor,
    needed: Sequence[bool],
    sparse: bool,
    *more: Tensor | int,
) -> list[Tensor | None]:
    """Return the gradients of hidden, weight and bias, None where not needed, by a function of the kernel."""
    x_ND = upcast(hidden_ND).contiguous()
    tokens, width = x_ND.shape
    node_U, rows = None, len(weight_MD)
    if sparse:
        node_U, rows = torch.empty(plan.met_nodes, dtype=torch.int64, device="cpu"), plan.met_nodes
        LIBRARY.call("numbers_met", plan.met, plan.met_nodes, node_U)
    shapes = ((tokens, width), (rows, width), (rows, 1))
    found = [empty_rows(x_ND, *shape) if asked else None for shape, asked in zip(shapes, needed, strict=True)]
    if not sparse:  # rows of nodes that no path meets
        for gradient in found[1:]:
            if gradient is not None:
                gradient.zero_()
    shared = recycled((plan.met_nodes,), torch.uint8)
    LIBRARY.call(
        f"{function}_{C_TYPES[x_ND.dtype]}",
        *(*plan.arguments, x_ND, weight_MD.to(x_ND.dtype).contiguous(), slope_P, upstream_N.contiguous(), width),
        *(plan.met_nodes, int(not sparse), torch.get_num_threads(), shared, *found, *more),
    )
    to_hidden, *to_parameters = (
        None if gradient is None else gradient.view(len(gradient), *like.shape[1:]).to(like.dtype)
        for gradient, like in zip(found, (hidden_ND, weight_MD, bias_M), strict=True)
    )
    return [
        to_hidden,
        *(
            None if gradient is None else spread(gradient, node_U, like)
            for gradient, like in zip(to_parameters, (weight_MD, bias_M), strict=True)
        ),
    ]
