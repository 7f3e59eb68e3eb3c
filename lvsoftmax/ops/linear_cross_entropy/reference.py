"""Cross-entropy of ``hidden @ weight.T + bias`` by blocks of tokens, in plain PyTorch.

Letters: N tokens, D hidden, V words, C tokens of one block. Only one ``[C, V]`` array is alive at a time. README.md
beside this file derives what is computed.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvsoftmax.ops.numerics import product_dtype, upcast

BLOCK = 2**24  # entries of one [C, V] array: 64 MiB in float32
FEWEST = 64  # tokens that keep a product at full speed; from V = BLOCK / FEWEST on, blocks grow with V


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor) -> Tensor:
    """Return ``-log softmax(hidden @ weight.T + bias)[target]`` of each token, for any upstream gradient.

    The backward pass computes the logits again: four matrix products in all, memory of one block.
    """
    return _PerToken.apply(hidden_ND, weight_VD, bias_V, target_N)


def linear_cross_entropy_loss(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, token_weight_N: Tensor
) -> Tensor:
    """Return ``sum(token_weight * nll)`` as a scalar, to be differentiated at most once.

    The weights are known beforehand, so the gradients are computed during the forward pass from each block of
    exponentials while it is there: three matrix products in all, memory of one block and of the gradients.
    """
    return _WeightedSum.apply(hidden_ND, weight_VD, bias_V, target_N, token_weight_N)


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, target_N):
        ctx.dtype = product_dtype(hidden_ND)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N)
        cast_VD = weight_VD.to(ctx.dtype)
        nll_N = zeros(target_N, hidden_ND.dtype)
        for block in blocks(len(hidden_ND), len(weight_VD)):
            nll_N[block] = _block(hidden_ND[block].to(ctx.dtype), cast_VD, bias_V, target_N[block])[0]
        return nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_N):
        hidden_ND, weight_VD, bias_V, target_N = ctx.saved_tensors
        gradients = _room(ctx, hidden_ND, weight_VD, bias_V)
        cast_VD = weight_VD.to(ctx.dtype)
        for block in blocks(len(hidden_ND), len(weight_VD)):
            hidden_CD = hidden_ND[block].to(ctx.dtype)
            _, grad_CV = _block(hidden_CD, cast_VD, bias_V, target_N[block], upstream_N[block])
            accumulate(gradients, block, grad_CV, hidden_CD, cast_VD)
        return *cast(gradients, hidden_ND, weight_VD, bias_V), None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, target_N, token_weight_N):
        dtype = product_dtype(hidden_ND)
        gradients = _room(ctx, hidden_ND, weight_VD, bias_V)
        cast_VD = weight_VD.to(dtype)
        nll_N = zeros(target_N, hidden_ND.dtype)
        for block in blocks(len(hidden_ND), len(weight_VD)):
            hidden_CD = hidden_ND[block].to(dtype)
            upstream_C = token_weight_N[block] if any(ctx.needs_input_grad[:3]) else None
            nll_N[block], grad_CV = _block(hidden_CD, cast_VD, bias_V, target_N[block], upstream_C)
            accumulate(gradients, block, grad_CV, hidden_CD, cast_VD)
        ctx.nll_N = nll_N if ctx.needs_input_grad[4] else None
        ctx.gradients = cast(gradients, hidden_ND, weight_VD, bias_V)
        return (token_weight_N * nll_N).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        # The gradients leave ctx for good: they are scaled in place, and autograd would copy what somebody still holds.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("this loss can be differentiated once; use the per-token nll to do it again")
        scaled = [None if gradient is None else gradient.mul_(upstream) for gradient in gradients]
        return *scaled, None, None if ctx.nll_N is None else upstream * ctx.nll_N


def blocks(tokens: int, vocab: int) -> Iterator[slice]:
    """Cut the tokens into blocks of about ``BLOCK`` logits."""
    size = max(BLOCK // max(vocab, 1), FEWEST)
    return (slice(start, start + size) for start in range(0, tokens, size))


def _block(
    hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_C: Tensor, upstream_C: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return what ``softmax_block`` does of the block's logits."""
    logit_CV = upcast(hidden_CD @ weight_VD.T)
    if bias_V is not None:
        logit_CV += bias_V
    return softmax_block(logit_CV, target_C, upstream_C)


def softmax_block(exp_CV: Tensor, target_C: Tensor, upstream_C: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the block's nll and, where ``upstream`` is given, ``upstream * (p - onehot(target))``; logits are lost.

    The sum over the other words is taken without the target. A difference from a sum over all words (``p - 1``)
    would have no correct digit left as p goes to 1.
    """
    exp_CV -= exp_CV.amax(1, keepdim=True)
    target_C1 = target_C[:, None]
    target_logit_C1 = exp_CV.gather(1, target_C1)
    exp_CV.exp_().scatter_(1, target_C1, 0.0)
    others_C1 = exp_CV.sum(1, keepdim=True)
    nll_C1 = -F.logsigmoid(target_logit_C1 - others_C1.log())
    if upstream_C is not None:
        exp_CV.scatter_(1, target_C1, -others_C1)
        exp_CV *= upstream_C[:, None] / (others_C1 + target_logit_C1.exp())
    return nll_C1.squeeze(1), None if upstream_C is None else exp_CV


def zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros in the precision of sums."""
    return torch.zeros_like(like, dtype=torch.promote_types(dtype, torch.float32))


def _room(ctx, *inputs: Tensor | None) -> list[Tensor | None]:
    """Return zeros for the sums over blocks of those gradients that are asked for."""
    pairs = zip(inputs, ctx.needs_input_grad, strict=False)
    return [zeros(x, x.dtype) if needed and x is not None else None for x, needed in pairs]


def accumulate(
    gradients: list[Tensor | None], block: slice, grad_CV: Tensor | None, hidden_CD: Tensor, weight_VD: Tensor
) -> None:
    """Add a block's share to the gradients of hidden, weight and bias."""
    grad_hidden_ND, grad_weight_VD, grad_bias_V = gradients
    if grad_CV is None:
        return
    if grad_bias_V is not None:
        grad_bias_V += grad_CV.sum(0)
    grad_CV = grad_CV.to(hidden_CD.dtype)
    if grad_hidden_ND is not None:
        grad_hidden_ND[block] = grad_CV @ weight_VD
    if grad_weight_VD is not None:
        if grad_weight_VD.dtype == grad_CV.dtype:
            grad_weight_VD.addmm_(grad_CV.T, hidden_CD)
        else:
            grad_weight_VD += grad_CV.T @ hidden_CD


def cast(gradients: list[Tensor | None], *inputs: Tensor | None) -> list[Tensor | None]:
    """Return the gradients in the precisions of what they belong to."""
    return [None if g is None or x is None else g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True)]
