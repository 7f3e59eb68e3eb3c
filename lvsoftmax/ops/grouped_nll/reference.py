"""Softmax within groups of words, in plain PyTorch.

Letters: N tokens, D hidden, V words, G groups, P pairs of a token and a word of its target's group, U distinct words
among the pairs. The words of a group are consecutive rows of the table. See README.md beside this file for the
derivation.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lvsoftmax.ops.inputs import check_operands, check_vocabulary
from lvsoftmax.ops.numerics import upcast
from lvsoftmax.ops.once_differentiable import once_differentiable
from lvsoftmax.ops.pairs import bag_starts, pair_gradients, pair_products


def grouped_nll(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, bound_G: Tensor, target_N: Tensor, *, sparse: bool
) -> Tensor:
    """Return ``-log softmax(scores within the target's group)[target]`` of each token.

    Cost: ``6 D`` FLOPs per pair for a training step, memory of about 50 bytes per pair, and the gradients. With
    ``sparse`` the gradients of weight and bias are coalesced COO tensors of U rows. A compiler sees one operation,
    which computes its scores a second time in the backward pass; ``sparse`` breaks the graph instead.

    Args:
        hidden_ND: hidden vectors.
        weight_VD: one row per word, the words of a group side by side.
        bias_V: one number per word.
        bound_G: ``[G + 1]`` where groups begin in the table, and V.
        target_N: row of each target in the table.
        sparse: whether gradients of the table are row-sparse.
    """
    check_operands(hidden_ND, weight_VD, bias_V, target_N)
    check_vocabulary("target", target_N, len(weight_VD))
    group_N = torch.bucketize(target_N, bound_G[1:-1], right=True)
    first_N = bound_G[group_N]
    size_N = bound_G[group_N + 1] - first_N
    if torch.compiler.is_compiling() and not sparse:
        return _one_node(hidden_ND, weight_VD, bias_V, first_N, size_N, target_N)
    return _ragged(hidden_ND, weight_VD, bias_V, first_N, size_N, target_N, sparse)


def grouped_log_softmax(score_VN: Tensor, group_V: Tensor, groups: int) -> Tensor:
    """Return the log-probability ``[V, N]`` of every word within its group.

    Words are rows, so that what all words of a group share is added and subtracted row by row.
    """
    score_VN = upcast(score_VN)
    index_VN = group_V[:, None].expand_as(score_VN)
    low_GN = score_VN.new_full((groups, score_VN.shape[1]), -torch.inf)
    shifted_VN = score_VN - low_GN.scatter_reduce(0, index_VN, score_VN.detach(), "amax")[group_V]
    sum_GN = torch.zeros_like(low_GN).index_add(0, group_V, shifted_VN.exp())
    return shifted_VN - sum_GN.log()[group_V]


class _Pairs(NamedTuple):
    """Every token with every word of its target's group, as one list ordered by token."""

    token_P: Tensor
    word_P: Tensor
    bag_N: Tensor  # where the pairs of each token begin
    target_N: Tensor  # the pair of each token and its own target


def _pair(first_N: Tensor, size_N: Tensor, target_N: Tensor) -> _Pairs:
    bag_N = bag_starts(size_N)
    pairs = int(size_N.sum())
    token_P = torch.repeat_interleave(size_N, output_size=pairs)
    shift_N = bag_N - first_N
    word_P = torch.arange(pairs, device=token_P.device) - shift_N[token_P]
    return _Pairs(token_P, word_P, bag_N, target_N + shift_N)


def _forward(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, pairs: _Pairs) -> tuple[Tensor, Tensor]:
    """Return the nll of the tokens, and its derivatives by the scores of the pairs."""
    token_P, word_P, bag_N, target_N = pairs
    exp_P = pair_products(hidden_ND, weight_VD, token_P, word_P, bag_N)
    exp_P += bias_V[word_P]
    largest_N = exp_P.new_full(target_N.shape, -torch.inf).scatter_reduce_(0, token_P, exp_P, "amax")
    exp_P -= largest_N[token_P]
    target_score_N = exp_P[target_N]
    # The sum over the other words is taken without the target: p - 1 would lose its digits as p goes to 1.
    exp_P.exp_()[target_N] = 0.0
    others_N = torch.zeros_like(largest_N).index_add_(0, token_P, exp_P)
    exp_P[target_N] = -others_N
    exp_P /= (others_N + target_score_N.exp())[token_P]
    return -F.logsigmoid(target_score_N - others_N.log()), exp_P


@torch.compiler.disable()
def _ragged(hidden_ND, weight_VD, bias_V, first_N, size_N, target_N, sparse):
    return _Ragged.apply(hidden_ND, weight_VD, bias_V, first_N, size_N, target_N, sparse)


class _Ragged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, first_N, size_N, target_N, sparse):
        # The tokens of a group follow each other, so that its rows are read from memory once.
        order_N = first_N.argsort()
        hidden_ND = hidden_ND[order_N]
        pairs = _pair(first_N[order_N], size_N[order_N], target_N[order_N])
        nll_N, slope_P = _forward(hidden_ND, weight_VD, bias_V, pairs)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, order_N, slope_P, *pairs)
        ctx.sparse = sparse
        return torch.empty_like(nll_N).index_copy_(0, order_N, nll_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_N):
        hidden_ND, weight_VD, bias_V, order_N, slope_P, *pairs = ctx.saved_tensors
        pairs = _Pairs(*pairs)
        grad_hidden_ND, *gradients = pair_gradients(
            slope_P * upstream_N[order_N][pairs.token_P],
            hidden_ND,
            weight_VD,
            bias_V,
            *pairs[:3],
            needed=ctx.needs_input_grad,
            sparse=ctx.sparse,
        )
        if grad_hidden_ND is not None:
            grad_hidden_ND = torch.empty_like(hidden_ND).index_copy_(0, order_N, grad_hidden_ND)
        return grad_hidden_ND, *gradients, None, None, None, None


@torch.library.custom_op("lvsoftmax::grouped_nll", mutates_args=())
def _one_node(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, first_N: Tensor, size_N: Tensor, target_N: Tensor
) -> Tensor:
    """The same as one operation for a compiler, whose shapes must not depend on data."""
    return _forward(hidden_ND, weight_VD, bias_V, _pair(first_N, size_N, target_N))[0]


@torch.library.custom_op("lvsoftmax::grouped_nll_backward", mutates_args=())
def _one_node_backward(
    upstream_N: Tensor,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    first_N: Tensor,
    size_N: Tensor,
    target_N: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    pairs = _pair(first_N, size_N, target_N)
    slope_P = _forward(hidden_ND, weight_VD, bias_V, pairs)[1]
    gradient_P = slope_P * upstream_N[pairs.token_P]
    return pair_gradients(  # pyright: ignore[reportReturnType]
        gradient_P, hidden_ND, weight_VD, bias_V, *pairs[:3], needed=(True, True, True), sparse=False
    )


@_one_node.register_fake
def _(hidden_ND, weight_VD, bias_V, first_N, size_N, target_N):
    return torch.empty_like(target_N, dtype=torch.promote_types(hidden_ND.dtype, torch.float32))


@_one_node_backward.register_fake
def _(upstream_N, hidden_ND, weight_VD, bias_V, first_N, size_N, target_N):
    return torch.empty_like(hidden_ND), torch.empty_like(weight_VD), torch.empty_like(bias_V)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, upstream_N):
    return *_one_node_backward(upstream_N, *ctx.saved_tensors), None, None, None


_one_node.register_autograd(_differentiate, setup_context=_save)
