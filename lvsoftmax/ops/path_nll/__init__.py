"""Log-probabilities of a binary tree of logistic decisions: along the targets' paths, or of every word."""

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from lvsoftmax.ops.backends import Backends, triton
from lvsoftmax.ops.gradients_in_forward import is_differentiated
from lvsoftmax.ops.inputs import check_operands, check_pairs
from lvsoftmax.ops.path_nll import gpu, native, reference

__all__ = ["BACKENDS", "path_nll", "path_nll_loss", "tree_log_prob"]

BACKENDS = Backends(triton=triton, cpp=native.LIBRARY.obstacle)


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
    *,
    sparse: bool,
    backend: str = "auto",
) -> Tensor:
    """Return ``-log p(target)`` of each token: the sum over its path of ``softplus(-+score)``.

    Cost: ``6 D`` FLOPs per pair of a token and a node on its path for a training step, memory ``O(pairs)`` and the
    gradients. With ``sparse`` those of weight and bias are coalesced COO tensors of the nodes on the paths. A compiler
    sees the reference, whose paths it pads to the depth of the tree; ``sparse`` breaks the graph instead.

    Args:
        hidden_ND: hidden vectors.
        weight_MD: one row per node.
        bias_M: one number per node.
        pace_M: what each node's score is multiplied by.
        node_branch_M: the branch from which each node hangs, of the tree.
        word_branch_V: the same of each word.
        word_rank_V: each word's place among the leaves from left to right.
        depth: length of the longest path.
        target_N: the words.
        sparse: whether gradients of weight and bias are row-sparse.
        backend: a name in ``BACKENDS`` or ``auto``.

    Raises:
        ValueError: operands that do not fit together; more than 2^31 pairs; a backend that cannot run there.
    """
    check_operands(hidden_ND, weight_MD, bias_M, target_N)
    check_pairs("target", len(target_N) * depth)
    chosen = BACKENDS.choose(backend, hidden_ND.device.type)
    if chosen == "cpp" and (sparse or not torch.compiler.is_compiling()):
        tree = (node_branch_M, word_branch_V, word_rank_V, depth)
        return native.path_nll(hidden_ND, weight_MD, bias_M, pace_M, tree, target_N, sparse)
    code = gpu if chosen == "triton" and (sparse or not torch.compiler.is_compiling()) else reference
    branches = (node_branch_M, word_branch_V)
    return code.path_nll(hidden_ND, weight_MD, bias_M, pace_M, *branches, depth, target_N, sparse=sparse)


def path_nll_loss(
    hidden_ND: Tensor,
    weight_MD: Tensor,
    bias_M: Tensor,
    pace_M: Tensor,
    node_branch_M: Tensor,
    word_branch_V: Tensor,
    word_rank_V: Tensor,
    depth: int,
    target_N: Tensor,
    token_weight_N: Tensor,
    *,
    sparse: bool,
    backend: str = "auto",
) -> Tensor:
    """Return ``sum(token_weight * path_nll)`` as a scalar, to be differentiated at most once.

    The weights are known beforehand, so the compiled kernel takes the gradients while it has the rows of the nodes at
    hand; other backends take them in the backward pass. Arguments are those of :func:`path_nll`.
    """
    check_operands(hidden_ND, weight_MD, bias_M, target_N, token_weight_N)
    operands, tree = (hidden_ND, weight_MD, bias_M, pace_M), (node_branch_M, word_branch_V, word_rank_V, depth)
    if is_differentiated(hidden_ND, weight_MD, bias_M) and (sparse or not torch.compiler.is_compiling()):
        if BACKENDS.choose(backend, hidden_ND.device.type) == "cpp":
            check_pairs("target", len(target_N) * depth)
            return native.path_nll_loss(*operands, tree, target_N, token_weight_N, sparse)
    return (token_weight_N * path_nll(*operands, *tree, target_N, sparse=sparse, backend=backend)).sum()


def tree_log_prob(
    score_MN: Tensor,
    node_branch_M: Tensor,
    word_branch_V: Tensor,
    levels: list[tuple[int, int]],
    node_position_M: Tensor,
    leaf_position_V: Tensor,
    word_leaf_V: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Return the log-probability ``[N, V]`` of every word: one pass down the tree.

    Cost: an exponential and a logarithm per node and token, beside the product that the scores come from. Where
    gradients are wanted, and on CUDA, the pass goes level by level in plain PyTorch.

    Args:
        score_MN: score of every node, pace and bias included; a parent's number is below its children's.
        node_branch_M: the branch from which each node hangs, of the tree.
        word_branch_V: the same of each word.
        levels: of every level, the number of its nodes and of the leaves that hang from it.
        node_position_M: for every node, its position among the branches of the level above.
        leaf_position_V: the same for every leaf, leaves by level.
        word_leaf_V: the leaf of every word.
        backend: a name in ``BACKENDS`` or ``auto``.
    """
    if BACKENDS.choose(backend, score_MN.device.type) == "cpp" and _is_plain(score_MN):
        return native.tree_log_prob(score_MN, node_branch_M, word_branch_V)
    return reference.tree_log_prob(score_MN, levels, node_position_M, leaf_position_V, word_leaf_V)


def _is_plain(x: Tensor) -> bool:
    """Return whether only the numbers of ``x`` are wanted: no derivative either way, no transform, no traced graph."""
    return not (
        torch.compiler.is_compiling()
        or is_differentiated(x)
        or is_functorch_wrapped_tensor(x)
        or forward_ad.unpack_dual(x).tangent is not None
    )
