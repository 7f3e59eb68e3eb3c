"""Token-chunked cross-entropy of ``hidden @ weight.T + bias`` in plain PyTorch.

Letters: N tokens, D hidden, V words, C tokens of one chunk. Only one ``[C, V]`` block of logits is alive at a time.
See README.md beside this file for the derivation.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lvsoftmax.ops.numerics import product_dtype, upcast

CHUNK = 512  # tokens per block: large enough for full-speed products, small enough that C * V stays modest


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor) -> Tensor:
    """Return ``-log softmax(hidden @ weight.T + bias)[target]`` of each token, for any upstream gradient.

    The backward pass recomputes the logits: four matrix products in all, memory ``C * V``.
    """
    return _PerToken.apply(hidden_ND, weight_VD, bias_V, target_N)


def linear_cross_entropy_loss(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, token_weight_N: Tensor
) -> Tensor:
    """Return ``sum(token_weight * nll)`` as a scalar.

    The weights are known beforehand, so the gradients are computed during the forward pass from each block of
    probabilities while it is there: three matrix products in all, memory ``C * V`` and the gradients.
    """
    return _WeightedSum.apply(hidden_ND, weight_VD, bias_V, target_N, token_weight_N)


def _block_logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    logit_CV = hidden_CD @ weight_VD.T
    if bias_V is not None:
        logit_CV += bias_V.to(logit_CV.dtype)
    return upcast(logit_CV)


def _block_nll(logit_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor]:
    lse_C = torch.logsumexp(logit_CV, 1)
    return lse_C - logit_CV.gather(1, target_C[:, None]).squeeze(1), lse_C


def _block_logit_gradient(logit_CV: Tensor, lse_C: Tensor, target_C: Tensor, upstream_C: Tensor) -> Tensor:
    """Overwrite logits by ``upstream * (p - onehot(target))``.

    The target's entry is minus the sum of all others: ``p - 1`` would lose every digit as ``p`` goes to 1.
    """
    gradient_CV = logit_CV.sub_(lse_C[:, None]).exp_()
    gradient_CV.scatter_(1, target_C[:, None], 0.0)
    gradient_CV.scatter_(1, target_C[:, None], -gradient_CV.sum(1, keepdim=True))
    return gradient_CV.mul_(upstream_C[:, None])


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, target_N):
        ctx.dtype = product_dtype(hidden_ND)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N)
        weight_cast_VD = weight_VD.to(ctx.dtype)
        nll_N = upcast(hidden_ND).new_empty(len(target_N))
        for start in range(0, len(target_N), CHUNK):
            block = slice(start, start + CHUNK)
            logit_CV = _block_logits(hidden_ND[block].to(ctx.dtype), weight_cast_VD, bias_V)
            nll_N[block] = _block_nll(logit_CV, target_N[block])[0]
        return nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_N):
        hidden_ND, weight_VD, bias_V, target_N = ctx.saved_tensors
        accumulate = _Gradients(hidden_ND, weight_VD, bias_V, ctx.dtype, ctx.needs_input_grad)
        for start in range(0, len(target_N), CHUNK):
            block = slice(start, start + CHUNK)
            logit_CV = _block_logits(hidden_ND[block].to(ctx.dtype), accumulate.weight_VD, bias_V)
            lse_C = torch.logsumexp(logit_CV, 1)
            accumulate.add(block, _block_logit_gradient(logit_CV, lse_C, target_N[block], upstream_N[block]))
        return *accumulate.result(), None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, target_N, token_weight_N):
        accumulate = _Gradients(hidden_ND, weight_VD, bias_V, product_dtype(hidden_ND), ctx.needs_input_grad)
        nll_N = upcast(hidden_ND).new_empty(len(target_N))
        for start in range(0, len(target_N), CHUNK):
            block = slice(start, start + CHUNK)
            logit_CV = _block_logits(hidden_ND[block].to(accumulate.dtype), accumulate.weight_VD, bias_V)
            nll_N[block], lse_C = _block_nll(logit_CV, target_N[block])
            if any(ctx.needs_input_grad[:3]):
                upstream_C = token_weight_N[block].to(logit_CV.dtype)
                accumulate.add(block, _block_logit_gradient(logit_CV, lse_C, target_N[block], upstream_C))
        ctx.gradients = accumulate.result()
        ctx.nll_N = nll_N
        return (token_weight_N * nll_N).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        # The gradients leave ctx for good: autograd clones whatever somebody else still refers to.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("this loss keeps no graph: call backward once, or use the per-token nll")
        scaled = [None if gradient is None else gradient.mul_(upstream) for gradient in gradients]
        return *scaled, None, upstream * ctx.nll_N if ctx.needs_input_grad[4] else None


class _Gradients:
    """Sums over chunks of the gradients of hidden, weight and bias, in float32 at least."""

    def __init__(self, hidden_ND, weight_VD, bias_V, dtype, needed):
        self.hidden_ND = hidden_ND
        self.weight_VD = weight_VD.to(dtype)
        self.dtype = dtype
        self.inputs = (hidden_ND, weight_VD, bias_V)
        self.grad_hidden_ND = upcast(hidden_ND).new_empty(hidden_ND.shape) if needed[0] else None
        self.grad_weight_VD = upcast(weight_VD).new_zeros(weight_VD.shape) if needed[1] else None
        self.grad_bias_V = upcast(bias_V).new_zeros(bias_V.shape) if bias_V is not None and needed[2] else None

    def add(self, block: slice, grad_CV: Tensor) -> None:
        if self.grad_bias_V is not None:
            self.grad_bias_V += grad_CV.sum(0)
        grad_CV = grad_CV.to(self.dtype)
        if self.grad_hidden_ND is not None:
            self.grad_hidden_ND[block] = grad_CV @ self.weight_VD
        if self.grad_weight_VD is not None:
            hidden_CD = self.hidden_ND[block].to(self.dtype)
            if self.dtype == self.grad_weight_VD.dtype:
                self.grad_weight_VD.addmm_(grad_CV.T, hidden_CD)
            else:
                self.grad_weight_VD += grad_CV.T @ hidden_CD

    def result(self) -> list[Tensor | None]:
        gradients = (self.grad_hidden_ND, self.grad_weight_VD, self.grad_bias_V)
        return [None if g is None else g.to(x.dtype) for g, x in zip(gradients, self.inputs, strict=True)]
