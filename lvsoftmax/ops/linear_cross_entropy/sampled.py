"""The losses of layers that look at few words, with gradients on the way.

Letters: N tokens, D hidden, V words, K drawn words, C tokens of one block. Words shared by the tokens are taken by
blocks of tokens, and no ``[N, K]`` is kept.

What differs from one objective to the next is a function of one block, its ``Slopes``. Each is a second form of the
function of the same name in :mod:`lvsoftmax.ops.objectives`, which holds the formula.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lvsoftmax.ops.gradients_in_forward import GradientsInForward
from lvsoftmax.ops.inputs import check_operands
from lvsoftmax.ops.linear_cross_entropy.reference import accumulate, blocks, cast, zeros
from lvsoftmax.ops.noise import Sample
from lvsoftmax.ops.numerics import product_dtype, softplus, sum_dtype, upcast
from lvsoftmax.ops.objectives import candidate_logits, candidate_rows, left_out_draws

Slopes = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""An objective: ``slopes(target_logit_C, logit_CK, upstream_C)``, of corrected logits.

Returns each token's value, and ``upstream`` times its derivative by the target's logit. ``logit`` is -inf where a drawn
word is left out; it is lost, ``upstream`` times the derivative by it takes its place.
"""


def candidate_loss(
    slopes: Slopes,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    sample: Sample,
    token_weight_N: Tensor,
    *,
    hits: bool,
    own: bool = False,
    sparse: bool,
) -> Tensor:
    """Return ``sum_n token_weight_n objective_n``, a scalar, to be differentiated at most once.

    Gradients are computed during the forward pass, those of shared words by three matrix products.

    Args:
        slopes: the objective.
        hidden_ND: hidden vectors.
        weight_VD: the table.
        bias_V: one number per word, or None for zeros.
        target_N: each token's word.
        sample: the drawn words, and what to take off the logits of draws and targets.
        token_weight_N: the weights of the sum.
        hits: whether a token sees those draws that are its own target.
        own: whether the draws are the targets, so that a token never sees draw ``n``.
        sparse: whether the gradients of table and bias are row-sparse (COO).
    """
    check_operands(hidden_ND, weight_VD, bias_V, target_N, token_weight_N)
    token_weight_N = token_weight_N.to(sum_dtype(hidden_ND))
    ids, log_expected, target_log_expected = sample
    left_out = left_out_draws(target_N, ids, hits=hits, own=own)
    if ids.ndim == 2:
        target_logit_N, logit_NK = candidate_logits(hidden_ND, weight_VD, bias_V, target_N, ids, sparse=sparse)
        target_logit_N = target_logit_N - target_log_expected
        return _LogitLoss.apply(target_logit_N, logit_NK, log_expected, token_weight_N, left_out, slopes)
    rows = candidate_rows(weight_VD, bias_V, target_N, ids, sparse=sparse)
    target_row_ND, row_KD, target_bias_N, bias_K = rows
    target_logit_N = upcast(hidden_ND * target_row_ND).sum(1) + target_bias_N - target_log_expected
    offset_K = bias_K - log_expected
    return _SharedLoss.apply(target_logit_N, hidden_ND, row_KD, offset_K, token_weight_N, left_out, slopes)


def sampled_softmax_slopes(target_logit_C: Tensor, logit_CK: Tensor, upstream_C: Tensor) -> tuple[Tensor, Tensor]:
    """``log(exp(t) + sum_k exp(s_k)) - t``."""
    sum_C, margin_C = _exponentials(target_logit_C, logit_CK)
    pull_C = upstream_C * torch.sigmoid(-margin_C)  # by what the target leaves of the sum
    logit_CK *= (pull_C / sum_C).nan_to_num_(0.0)[:, None]
    return -F.logsigmoid(margin_C), -pull_C


def importance_sampling_slopes(target_logit_C: Tensor, logit_CK: Tensor, upstream_C: Tensor) -> tuple[Tensor, Tensor]:
    """``log(sum_k exp(s_k)) - t``: the target not in the sum."""
    sum_C, margin_C = _exponentials(target_logit_C, logit_CK)
    logit_CK *= (upstream_C / sum_C)[:, None]
    return -margin_C, -upstream_C


def noise_contrastive_slopes(target_logit_C: Tensor, logit_CK: Tensor, upstream_C: Tensor) -> tuple[Tensor, Tensor]:
    """``-log sigmoid(t) - sum_k log sigmoid(-s_k)``."""
    value_C = softplus(-target_logit_C) + softplus(logit_CK).sum(1)
    logit_CK.sigmoid_().mul_(upstream_C[:, None])
    return value_C, -upstream_C * torch.sigmoid(-target_logit_C)


def black_out_slopes(target_logit_C: Tensor, logit_CK: Tensor, upstream_C: Tensor) -> tuple[Tensor, Tensor]:
    """``-log p_t - sum_k log(1 - p_k)`` with ``p`` the softmax over target and draws.

    With ``r = p / (1 - p)`` and ``R`` the sum of ``r`` over the draws, the derivative by a draw's logit is
    ``p (2 + r - R)``, that by the target's ``-(1 - p) - R p``. The most probable word, whose ``p`` may be all but one
    and ``r`` beyond all bounds, is kept apart: ``x`` is its log-odds, and ``a`` the others' shares of what it leaves.
    """
    largest_C, first_C = logit_CK.max(1)
    drawn_C = largest_C > target_logit_C  # whether the most probable word is one of the draws
    first_C1 = first_C[:, None]
    logit_CK.scatter_(1, first_C1, largest_C.masked_fill(drawn_C, -torch.inf)[:, None])
    rest_target_C = target_logit_C.masked_fill(~drawn_C, -torch.inf)
    second_C = torch.maximum(logit_CK.amax(1), rest_target_C).nan_to_num_(neginf=0.0)
    exp_CK = logit_CK.sub_(second_C[:, None]).exp_()
    log_sum_C = (exp_CK.sum(1) + (rest_target_C - second_C).exp()).log()
    x_C = torch.maximum(largest_C, target_logit_C) - second_C - log_sum_C
    a_CK = exp_CK.mul_((-log_sum_C).exp().nan_to_num_(posinf=0.0)[:, None])
    log_target_a_C = torch.where(drawn_C, target_logit_C - second_C - log_sum_C, -torch.inf)
    target_a_C = log_target_a_C.exp()

    first_p_C, left_C = torch.sigmoid(x_C), torch.sigmoid(-x_C)
    p_CK = a_CK * left_C[:, None]
    r_CK = p_CK / (1 - p_CK)
    sum_r_C = r_CK.sum(1)
    log_p_C = torch.where(drawn_C, log_target_a_C - softplus(x_C), F.logsigmoid(x_C))
    value_C = r_CK.log1p().sum(1) - log_p_C + torch.where(drawn_C, softplus(x_C), 0.0)
    first_drawn_p_C = torch.where(drawn_C, first_p_C, 0.0)  # times a share: p times the first word's part of R
    r_CK.add_(2 - sum_r_C[:, None]).mul_(p_CK)
    a_CK.mul_(-first_drawn_p_C[:, None]).add_(r_CK)
    a_CK.scatter_add_(1, first_C1, (first_drawn_p_C * (2 - sum_r_C))[:, None])
    a_CK.mul_(upstream_C[:, None])
    target_p_C = torch.where(drawn_C, target_a_C * left_C, first_p_C)
    target_miss_C = torch.where(drawn_C, 1 - target_p_C, left_C)
    slope_C = -target_miss_C - sum_r_C * target_p_C - target_a_C * first_drawn_p_C
    return value_C, upstream_C * slope_C


def one_versus_each_slopes(
    log_expected: Tensor, target_logit_C: Tensor, logit_CK: Tensor, upstream_C: Tensor
) -> tuple[Tensor, Tensor]:
    """``sum_k softplus(s_k - t) / exp(log_expected_k)``; to be given ``log_expected`` by ``functools.partial``."""
    above_CK, share = logit_CK.sub_(target_logit_C[:, None]), torch.exp(-log_expected)
    value_C = (softplus(above_CK) * share).sum(1)
    above_CK.sigmoid_().mul_(share).mul_(upstream_C[:, None])
    return value_C, -above_CK.sum(1)


def _exponentials(target_logit_C: Tensor, logit_CK: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite the logits by ``exp(s - max s)``; return their sum, and ``t - log sum exp(s)``."""
    # A row whose every word is left out has no largest logit to subtract.
    largest_C = logit_CK.amax(1).nan_to_num_(neginf=0.0)
    sum_C = logit_CK.sub_(largest_C[:, None]).exp_().sum(1)
    return sum_C, target_logit_C - largest_C - sum_C.log()


class _SharedLoss(GradientsInForward):
    @staticmethod
    def forward(ctx, target_logit_N, hidden_ND, row_KD, offset_K, token_weight_N, left_out, slopes):
        dtype = product_dtype(hidden_ND)
        gradients: list[Tensor | None] = [zeros(x, x.dtype) for x in (hidden_ND, row_KD, offset_K)]
        cast_KD = row_KD.to(dtype)
        value_N, target_gradient_N = torch.empty_like(target_logit_N), torch.empty_like(target_logit_N)
        for block in blocks(len(hidden_ND), len(row_KD)):
            hidden_CD = hidden_ND[block].to(dtype)
            logit_CK = upcast(hidden_CD @ cast_KD.T)
            logit_CK += offset_K
            if left_out is not None:
                logit_CK.masked_fill_(left_out[0][block, None] == left_out[1], -torch.inf)
            value_N[block], target_gradient_N[block] = slopes(target_logit_N[block], logit_CK, token_weight_N[block])
            accumulate(gradients, block, logit_CK, hidden_CD, cast_KD)
        loss = (token_weight_N * value_N).sum()
        ctx.gradients = (target_gradient_N, *cast(gradients, hidden_ND, row_KD, offset_K), value_N)
        return loss


class _LogitLoss(GradientsInForward):
    @staticmethod
    def forward(ctx, target_logit_N, logit_NK, log_expected_NK, token_weight_N, left_out, slopes):
        gradient_NK = logit_NK - log_expected_NK
        if left_out is not None:
            gradient_NK.masked_fill_(left_out[0][:, None] == left_out[1], -torch.inf)
        value_N, target_gradient_N = slopes(target_logit_N, gradient_NK, token_weight_N)
        loss = (token_weight_N * value_N).sum()
        log_expected_gradient_NK = -gradient_NK if ctx.needs_input_grad[2] else None
        ctx.gradients = (target_gradient_N, gradient_NK, log_expected_gradient_NK, value_N)
        return loss
