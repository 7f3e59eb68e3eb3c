"""Cross-entropy of ``hidden @ weight.T + bias`` by blocks of tokens, in plain PyTorch: the ``eager`` backend.

Letters: N tokens, D hidden, V words, C tokens of one block. Only one ``[C, V]`` array is alive at a time. README.md
beside this file derives what is computed. The three functions that a backend consists of come first.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from lvsoftmax.ops import buffers
from lvsoftmax.ops.numerics import upcast

BLOCK = 2**24  # entries of one [C, V] array: 64 MiB in float32
FEWEST = 64  # tokens that keep a product at full speed; from V = BLOCK / FEWEST on, blocks grow with V


def sums(
    dtype: torch.dtype, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    """Return the log of the sum over all words but the target, and the target's logit, of each token."""
    cast_VD = weight_VD.to(dtype)
    others_N, target_logit_N = zeros(target_N, hidden_ND.dtype), zeros(target_N, hidden_ND.dtype)
    for block in blocks(len(hidden_ND), len(weight_VD)):
        logit_CV, _ = _logits(hidden_ND[block].to(dtype), cast_VD, bias_V, softcap)
        target_C1 = target_N[block, None]
        target_logit_N[block] = logit_CV.gather(1, target_C1).squeeze(1)
        others_N[block] = logit_CV.scatter_(1, target_C1, -torch.inf).logsumexp(1)
    return others_N, target_logit_N


def gradients(
    dtype: torch.dtype,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    softcap: float,
    others_N: Tensor,
    others_factor_N: Tensor,
    target_factor_N: Tensor,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of hidden, weight and bias that are needed, the logits being computed again.

    The derivative by a capped logit is ``others_factor * exp(logit - others)``; for the target ``target_factor``.
    """
    gradients = room(needed, hidden_ND, weight_VD, bias_V)
    cast_VD = weight_VD.to(dtype)
    for block in blocks(len(hidden_ND), len(weight_VD)):
        hidden_CD = hidden_ND[block].to(dtype)
        grad_CV, slope_CV = _logits(hidden_CD, cast_VD, bias_V, softcap)
        grad_CV.sub_(others_N[block, None]).exp_().mul_(others_factor_N[block, None])
        grad_CV.scatter_(1, target_N[block, None], target_factor_N[block, None])
        accumulate(gradients, block, grad_CV if slope_CV is None else grad_CV.mul_(slope_CV), hidden_CD, cast_VD)
    return gradients


def weighted(
    dtype: torch.dtype,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    softcap: float,
    token_weight_N: Tensor,
    z_loss: float,
    needed: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Return each token's ``nll + z_loss * logsumexp^2``, and the needed gradients of the sum weighted by token."""
    gradients = room(needed, hidden_ND, weight_VD, bias_V)
    cast_VD = weight_VD.to(dtype)
    value_N = zeros(target_N, hidden_ND.dtype)
    for block in blocks(len(hidden_ND), len(weight_VD)):
        hidden_CD = hidden_ND[block].to(dtype)
        logit_CV, slope_CV = _logits(hidden_CD, cast_VD, bias_V, softcap)
        value_N[block], grad_CV = softmax_block(logit_CV, target_N[block], token_weight_N[block], z_loss)
        if slope_CV is not None:
            grad_CV *= slope_CV
        accumulate(gradients, block, grad_CV, hidden_CD, cast_VD)
    return value_N, gradients


def blocks(tokens: int, vocab: int) -> Iterator[slice]:
    """Cut the tokens into blocks of about ``BLOCK`` logits."""
    size = max(BLOCK // max(vocab, 1), FEWEST)
    return (slice(start, start + size) for start in range(0, tokens, size))


def _logits(
    hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float
) -> tuple[Tensor, Tensor | None]:
    """Return the block's logits and, where they are capped, their derivatives by what they were before."""
    logit_CV = upcast(hidden_CD @ weight_VD.T)
    if bias_V is not None:
        logit_CV += bias_V
    if not softcap:
        return logit_CV, None
    logit_CV.div_(softcap).tanh_()
    return logit_CV * softcap, logit_CV.square_().neg_().add_(1)


def softmax_block(exp_CV: Tensor, target_C: Tensor, upstream_C: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the block's ``nll + z_loss * logsumexp^2``, and ``upstream`` times its gradient in the place of logits.

    The sum over the other words is taken without the target. A difference from a sum over all words (``p - 1``)
    would have no correct digit left as p goes to 1.
    """
    largest_C1 = exp_CV.amax(1, keepdim=True)
    exp_CV -= largest_C1
    target_C1 = target_C[:, None]
    target_logit_C1 = exp_CV.gather(1, target_C1)
    exp_CV.exp_().scatter_(1, target_C1, 0.0)
    others_C1 = exp_CV.sum(1, keepdim=True)
    value_C1 = -F.logsigmoid(target_logit_C1 - others_C1.log())
    target_exp_C1 = target_logit_C1.exp()
    sum_C1 = others_C1 + target_exp_C1
    logsumexp_C1 = sum_C1.log() + largest_C1
    if z_loss:
        value_C1 = value_C1 + z_loss * logsumexp_C1.square()
    slope_C1 = 2 * z_loss * logsumexp_C1
    scale_C1 = upstream_C[:, None] / sum_C1
    exp_CV *= scale_C1 * (1 + slope_C1)
    exp_CV.scatter_(1, target_C1, scale_C1 * (slope_C1 * target_exp_C1 - others_C1))
    return value_C1.squeeze(1), exp_CV


def zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros in the precision of sums."""
    return buffers.empty_like(like, like.shape, torch.promote_types(dtype, torch.float32)).zero_()


def room(needed: Sequence[bool], *inputs: Tensor | None) -> list[Tensor | None]:
    """Return zeros for the sums over blocks of those gradients that are needed."""
    return [zeros(x, x.dtype) if asked and x is not None else None for x, asked in zip(inputs, needed, strict=True)]


def accumulate(
    gradients: list[Tensor | None], block: slice, grad_CV: Tensor, hidden_CD: Tensor, weight_VD: Tensor
) -> None:
    """Add a block's share to the gradients of hidden, weight and bias."""
    grad_hidden_ND, grad_weight_VD, grad_bias_V = gradients
    if grad_bias_V is not None:
        grad_bias_V += grad_CV.sum(0)
    as_given: AbstractContextManager = nullcontext()
    if hidden_CD.dtype == torch.float16:  # a token's weight may take its slopes below what this type can hold
        hidden_CD, weight_VD = hidden_CD.float(), weight_VD.float()
        as_given = torch.autocast(hidden_CD.device.type, enabled=False)  # the caller's would narrow them again
    grad_CV = grad_CV.to(hidden_CD.dtype)
    with as_given:
        if grad_hidden_ND is not None:
            grad_hidden_ND[block] = grad_CV @ weight_VD
        if grad_weight_VD is not None:
            if grad_weight_VD.dtype == grad_CV.dtype:
                grad_weight_VD.addmm_(grad_CV.T, hidden_CD)
            else:
                grad_weight_VD += grad_CV.T @ hidden_CD


def only_needed(needed: Sequence[bool], made: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradients that are needed, of tensors that are empty where they are not."""
    return [gradient if asked else None for gradient, asked in zip(made, needed, strict=True)]


def cast(gradients: list[Tensor | None], *inputs: Tensor | None) -> list[Tensor | None]:
    """Return the gradients in the precisions of what they belong to."""
    return [None if g is None or x is None else g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True)]
