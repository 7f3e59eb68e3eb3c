"""A mixture of softmaxes over one table, in plain PyTorch.

Letters: N tokens, E experts, M = N E vectors of experts, D their width, V words, C tokens of one block, R = C E rows of
it. Neither ``[N, E, V]`` nor, but for all log-probabilities, ``[N, V]`` is ever there. README.md beside this file
derives what is computed.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lvsoftmax.ops.gradients_in_forward import GradientsInForward, is_differentiated
from lvsoftmax.ops.linear_cross_entropy import BACKENDS, linear_cross_entropy, reference
from lvsoftmax.ops.linear_cross_entropy.reference import accumulate, cast, room, zeros
from lvsoftmax.ops.numerics import product_dtype, sum_dtype, upcast
from lvsoftmax.ops.once_differentiable import once_differentiable
from lvsoftmax.ops.softmax import log_softmax, logsumexp


def mixture_nll(
    prior_logit_NE: Tensor,
    expert_NED: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    target_N: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Return ``-log(sum over e of softmax(prior)_e softmax(weight @ expert_e + bias)[target])`` of each token.

    For any upstream gradient; the backward pass computes the logits again: four matrix products per expert in all,
    memory of one block.
    """
    experts = prior_logit_NE.shape[1]
    row_target = target_N.repeat_interleave(experts)
    row_nll = linear_cross_entropy(expert_NED.flatten(0, 1), weight_VD, bias_V, row_target, backend=backend)
    return _mix(prior_logit_NE, row_nll.view_as(prior_logit_NE))


def mixture_nll_loss(
    prior_logit_NE: Tensor,
    expert_NED: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    target_N: Tensor,
    token_weight_N: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Return ``sum(token_weight * nll)`` as a scalar, to be differentiated at most once.

    The ``eager`` backend computes gradients during the forward pass: three matrix products per expert, memory of one
    block and of the gradients. The others know one upstream gradient per token only before they start: four products.
    """
    inputs, token_weight_N = (prior_logit_NE, expert_NED, weight_VD, bias_V), token_weight_N.to(sum_dtype(expert_NED))
    if BACKENDS.choose(backend, target_N.device) != "eager" or not is_differentiated(*inputs):
        return (token_weight_N * mixture_nll(*inputs, target_N, backend=backend)).sum()
    return _WeightedSum.apply(prior_logit_NE, expert_NED.flatten(0, 1), weight_VD, bias_V, token_weight_N, target_N)


def mixture_log_prob(log_prior_NE: Tensor, expert_NED: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
    """Return the log-probability ``[N, V]`` of every word, summed up expert by expert.

    The backward pass goes through the experts again, so that it, too, holds a few arrays ``[N, V]`` whatever E.
    """
    return _LogProb.apply(log_prior_NE, expert_NED, weight_VD, bias_V)


def _mix(prior_logit_NE: Tensor, nll_NE: Tensor) -> Tensor:
    """Return the nll of the mixture from those of the experts.

    Where the mixture is nearly sure of the target, a logarithm of a sum near 1 would have no correct digits, and
    neither would its gradients: there the sum is that of what the experts lack to certainty.
    """
    prior_logit_NE = upcast(prior_logit_NE)
    miss_N = -(torch.softmax(prior_logit_NE, 1) * torch.expm1(-nll_NE)).sum(1)
    sure_N = -torch.log1p(-miss_N.clamp(max=0.5))
    unsure_N = -logsumexp(log_softmax(prior_logit_NE, 1) - nll_NE, 1)
    return torch.where(miss_N < 0.5, sure_N, unsure_N)


class _WeightedSum(GradientsInForward):
    @staticmethod
    def forward(ctx, prior_logit_NE, expert_MD, weight_VD, bias_V, token_weight_N, target_N):
        dtype = product_dtype(expert_MD)
        tokens, experts = prior_logit_NE.shape
        inputs = prior_logit_NE, expert_MD, weight_VD, bias_V
        gradients = room(ctx.needs_input_grad[:4], *inputs)
        cast_VD = weight_VD.to(dtype)
        nll_N = zeros(target_N, expert_MD.dtype)
        for block in _blocks(tokens, experts, len(weight_VD)):
            rows = slice(block.start * experts, block.stop * experts)
            expert_RD = expert_MD[rows].to(dtype)
            exp_RV = upcast(expert_RD @ cast_VD.T)
            exp_RV += bias_V
            exp_RV -= exp_RV.amax(1, keepdim=True)
            target_R1 = target_N[block].repeat_interleave(experts)[:, None]
            target_logit_R1 = exp_RV.gather(1, target_R1)
            # The sum over the other words is taken without the target: p - 1 would lose its digits as p goes to 1.
            others_R1 = exp_RV.exp_().scatter_(1, target_R1, 0.0).sum(1, keepdim=True)
            nll_RE = -F.logsigmoid(target_logit_R1 - others_R1.log()).view(-1, experts)
            with torch.enable_grad():
                prior, expert_nll = upcast(prior_logit_NE[block].detach()).requires_grad_(), nll_RE.requires_grad_()
                mixed_C = _mix(prior, expert_nll)
            nll_N[block] = mixed_C.detach()
            grad_prior_CE, pull_CE = torch.autograd.grad(mixed_C, (prior, expert_nll), token_weight_N[block])
            if gradients[0] is not None:
                gradients[0][block] = grad_prior_CE
            exp_RV.scatter_(1, target_R1, -others_R1)
            exp_RV *= pull_CE.reshape(-1, 1) / (others_R1 + target_logit_R1.exp())
            accumulate(gradients[1:], rows, exp_RV, expert_RD, cast_VD)
        ctx.gradients = (*cast(gradients, *inputs), nll_N if ctx.needs_input_grad[4] else None)
        return (token_weight_N * nll_N).sum()


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_prior_NE, expert_NED, weight_VD, bias_V):
        ctx.dtype = product_dtype(expert_NED)
        cast_VD = weight_VD.to(ctx.dtype)
        log_prob_NV = None
        for prior_N, expert_ND in zip(log_prior_NE.unbind(1), expert_NED.unbind(1), strict=True):
            term_NV = _log_prob(expert_ND.to(ctx.dtype), cast_VD, bias_V) + prior_N[:, None]
            log_prob_NV = term_NV if log_prob_NV is None else torch.logaddexp(log_prob_NV, term_NV)
        ctx.save_for_backward(log_prior_NE, expert_NED, weight_VD, bias_V, log_prob_NV)
        return log_prob_NV

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_NV):
        log_prior_NE, expert_NED, weight_VD, bias_V, log_prob_NV = ctx.saved_tensors
        inputs = log_prior_NE, expert_NED, weight_VD, bias_V
        grad_prior_NE, grad_expert_NED, grad_weight_VD, grad_bias_V = (zeros(x, x.dtype) for x in inputs)
        cast_VD = weight_VD.to(ctx.dtype)
        log_prob_NV = log_prob_NV.clamp(min=torch.finfo(log_prob_NV.dtype).min)  # of words that no expert can give
        for e in range(log_prior_NE.shape[1]):
            expert_ND = expert_NED[:, e].to(ctx.dtype)
            log_p_NV = _log_prob(expert_ND, cast_VD, bias_V)
            # What this expert contributes to each word's probability is its share of that word's upstream.
            grad_NV = upstream_NV * (log_p_NV + log_prior_NE[:, e, None] - log_prob_NV).exp_()
            grad_prior_NE[:, e] = grad_NV.sum(1)
            grad_NV -= log_p_NV.exp_() * grad_prior_NE[:, e, None]
            grad_expert_ND = torch.empty_like(grad_expert_NED[:, e])
            accumulate([grad_expert_ND, grad_weight_VD, grad_bias_V], slice(None), grad_NV, expert_ND, cast_VD)
            grad_expert_NED[:, e] = grad_expert_ND
        return tuple(cast([grad_prior_NE, grad_expert_NED, grad_weight_VD, grad_bias_V], *inputs))


def _blocks(tokens: int, experts: int, vocab: int) -> Iterator[slice]:
    """Cut the tokens into blocks of about ``BLOCK`` logits, all experts of a token in one."""
    size = max(max(reference.BLOCK // vocab, reference.FEWEST) // experts, 1)
    return (slice(start, start + size) for start in range(0, tokens, size))


def _log_prob(expert_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
    return log_softmax(upcast(expert_ND @ weight_VD.T) + bias_V, 1)
