"""The losses of sampled layers by blocks of tokens, with gradients on the way: no ``[N, K]`` is kept.

Letters: N tokens, D hidden, K drawn words shared by the tokens, C tokens of one block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvsoftmax.ops.linear_cross_entropy.reference import accumulate, blocks, cast, zeros
from lvsoftmax.ops.numerics import product_dtype, upcast


def sampled_softmax_loss(
    hidden_ND: Tensor,
    row_KD: Tensor,
    offset_K: Tensor,
    target_logit_N: Tensor,
    target_N: Tensor,
    ids_K: Tensor,
    token_weight_N: Tensor,
) -> Tensor:
    """Return ``sum_n token_weight_n (log(exp(t_n) + sum_{k: ids_k != target_n} exp(s_nk)) - t_n)``, a scalar.

    ``s = hidden @ row.T + offset`` and ``t`` are corrected logits. To be differentiated at most once; the gradients of
    ``hidden``, ``row``, ``offset`` and ``target_logit`` are computed during the forward pass by three matrix products.
    """
    hit = (target_N, ids_K)
    return _CandidateLoss.apply(hidden_ND, row_KD, offset_K, target_logit_N, token_weight_N, hit)


def importance_sampling_loss(
    hidden_ND: Tensor, row_KD: Tensor, offset_K: Tensor, target_logit_N: Tensor, token_weight_N: Tensor
) -> Tensor:
    """Return ``sum_n token_weight_n (log(sum_k exp(s_nk)) - t_n)``: the target not in the sum."""
    return _CandidateLoss.apply(hidden_ND, row_KD, offset_K, target_logit_N, token_weight_N, None)


class _CandidateLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, row_KD, offset_K, target_logit_N, token_weight_N, hit):
        dtype = product_dtype(hidden_ND)
        gradients: list[Tensor | None] = [zeros(x, x.dtype) for x in (hidden_ND, row_KD, offset_K)]
        cast_KD = row_KD.to(dtype)
        target_logit_N = upcast(target_logit_N)
        loss_N, target_gradient_N = torch.empty_like(target_logit_N), torch.empty_like(target_logit_N)
        for block in blocks(len(hidden_ND), len(row_KD)):
            hidden_CD = hidden_ND[block].to(dtype)
            exp_CK = upcast(hidden_CD @ cast_KD.T)
            exp_CK += offset_K
            if hit is not None:
                exp_CK.masked_fill_(hit[0][block, None] == hit[1], -torch.inf)
            # A row whose every word is left out has no largest logit to subtract.
            largest_C = exp_CK.amax(1).nan_to_num_(neginf=0.0)
            sum_C = exp_CK.sub_(largest_C[:, None]).exp_().sum(1)
            margin_C = target_logit_N[block] - largest_C - sum_C.log()
            loss_N[block] = -margin_C if hit is None else -F.logsigmoid(margin_C)
            # What the drawn words have of the sum: everything, or what the target leaves of it.
            share_C = torch.ones_like(margin_C) if hit is None else torch.sigmoid(-margin_C)
            pull_C = token_weight_N[block] * share_C
            target_gradient_N[block] = -pull_C
            exp_CK *= (pull_C / sum_C).nan_to_num_(0.0)[:, None]
            accumulate(gradients, block, exp_CK, hidden_CD, cast_KD)
        ctx.gradients = [*cast(gradients, hidden_ND, row_KD, offset_K), target_gradient_N]
        ctx.loss_N = loss_N if ctx.needs_input_grad[4] else None
        return (token_weight_N * loss_N).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        # The gradients leave ctx for good: they are scaled in place, and autograd would copy what somebody still holds.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("this loss can be differentiated once; use the per-token forward to do it again")
        return (
            *(gradient.mul_(upstream) for gradient in gradients),
            None if ctx.loss_N is None else upstream * ctx.loss_N,
            None,
        )
