"""Tree log-probabilities in plain PyTorch.

Letters: N tokens, D hidden, V words, M = V - 1 nodes, L depth of the tree, P pairs of a token and a node on its
target's path, U distinct nodes among the pairs. Of the branches of node ``n``, ``2 n`` is taken with probability
``sigmoid(score[n])`` and ``2 n + 1`` with ``sigmoid(-score[n])``, where ``score = pace (weight . hidden + bias)``. See
README.md beside this file for the derivation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lvsoftmax.ops.inputs import look_up
from lvsoftmax.ops.numerics import softplus, upcast
from lvsoftmax.ops.once_differentiable import once_differentiable
from lvsoftmax.ops.pairs import bag_starts, pair_gradients, pair_products


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
    """Return ``-log p(target)`` of each token: the sum over its path of ``softplus(-+score)``.

    Cost: ``6 D`` FLOPs per pair for a training step, memory ``O(P)`` and the gradients. With ``sparse`` the gradients
    of weight and bias are coalesced COO tensors of U rows. While a graph is traced, paths are padded to the depth of
    the tree, since shapes must not depend on data then; ``sparse`` breaks the graph instead.
    """
    branch_NL = _paths(node_branch_M, word_branch_V, depth, target_N)
    if torch.compiler.is_compiling() and not sparse:
        return _padded(hidden_ND, weight_MD, bias_M, pace_M, branch_NL)
    return _ragged(hidden_ND, weight_MD, bias_M, pace_M, branch_NL, sparse)


def tree_log_prob(
    score_MN: Tensor,
    levels: list[tuple[int, int]],
    node_position_M: Tensor,
    leaf_position_V: Tensor,
    word_leaf_V: Tensor,
) -> Tensor:
    """Return the log-probability ``[N, V]`` of every word, by one pass down the tree.

    Args:
        score_MN: score of every node, by level; a level is then one block of memory.
        levels: of every level, the number of its nodes and of the leaves that hang from it.
        node_position_M: for every node, its position among the branches of the level above.
        leaf_position_V: the same for every leaf, leaves by level.
        word_leaf_V: the leaf of every word.
    """
    reached_KN = upcast(score_MN).new_zeros(1, score_MN.shape[1])
    leaves, node, leaf = [], 0, 0
    for width, leaf_count in levels:
        score_KN = upcast(score_MN[node : node + width])
        taken_KBN = torch.stack([F.logsigmoid(score_KN), F.logsigmoid(-score_KN)], 1) + reached_KN[:, None]
        branch_BN = taken_KBN.flatten(0, 1)
        leaves.append(branch_BN[leaf_position_V[leaf : leaf + leaf_count]])
        node, leaf = node + width, leaf + leaf_count
        reached_KN = branch_BN[node_position_M[node : node + 2 * width - leaf_count]]
    return torch.cat(leaves)[word_leaf_V].T


def _paths(node_branch_M: Tensor, word_branch_V: Tensor, depth: int, target_N: Tensor) -> Tensor:
    """Return the branches from each target up to the root, ``[N, L]``, filled with -1."""
    branch_N = look_up(word_branch_V, target_N)
    path = [branch_N]
    for _ in range(depth - 1):
        # the root, node 0, hangs from branch -1; so does whatever lies above it
        branch_N = node_branch_M[(branch_N >> 1).clamp(min=0)]
        path.append(branch_N)
    return torch.stack(path, 1)


def _padded(hidden_ND: Tensor, weight_MD: Tensor, bias_M: Tensor, pace_M: Tensor, branch_NL: Tensor) -> Tensor:
    """Gather ``[N, L, D]``, which a compiler fuses with the product."""
    node_NL = (branch_NL >> 1).clamp(min=0)
    product_NL = (upcast(weight_MD[node_NL]) * upcast(hidden_ND)[:, None]).sum(2)
    score_NL = pace_M[node_NL] * (product_NL + upcast(bias_M[node_NL]))
    nll_NL = softplus(torch.where(branch_NL % 2 == 0, -score_NL, score_NL))
    return torch.where(branch_NL < 0, 0.0, nll_NL).sum(1)


@torch.compiler.disable()
def _ragged(
    hidden_ND: Tensor, weight_MD: Tensor, bias_M: Tensor, pace_M: Tensor, branch_NL: Tensor, sparse: bool
) -> Tensor:
    return _Ragged.apply(hidden_ND, weight_MD, bias_M, pace_M, branch_NL, sparse)


class _Ragged(torch.autograd.Function):
    """The pairs as one list, ordered by token; all three products are those of :mod:`lvsoftmax.ops.pairs`."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_MD, bias_M, pace_M, branch_NL, sparse):
        on_path_NL = branch_NL >= 0
        token_P, step_P = on_path_NL.nonzero(as_tuple=True)
        branch_P = branch_NL[token_P, step_P].long()
        node_P, sign_P = branch_P >> 1, 1 - 2 * (branch_P & 1)
        bag_N = bag_starts(on_path_NL.sum(1))
        score_P = pair_products(hidden_ND, weight_MD, token_P, node_P, bag_N)
        # what a decision lacks to certainty, sigmoid(-x), keeps its digits where 1 - sigmoid(x) loses them
        pace_P = sign_P * pace_M[node_P]
        confidence_P = pace_P * (score_P + bias_M[node_P])
        ctx.save_for_backward(
            hidden_ND, weight_MD, bias_M, token_P, node_P, bag_N, -pace_P * torch.sigmoid(-confidence_P)
        )
        ctx.sparse = sparse
        return score_P.new_zeros(len(hidden_ND)).index_add_(0, token_P, softplus(-confidence_P))

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_N):
        hidden_ND, weight_MD, bias_M, token_P, node_P, bag_N, slope_P = ctx.saved_tensors
        gradients = pair_gradients(
            slope_P * upstream_N[token_P],
            hidden_ND,
            weight_MD,
            bias_M,
            token_P,
            node_P,
            bag_N,
            needed=ctx.needs_input_grad,
            sparse=ctx.sparse,
        )
        return *gradients, None, None, None
