"""Cross-entropy of ``hidden @ weight.T + bias`` as differentiable functions over any backend.

Letters: N tokens, D hidden, V words. A backend has the three functions of ``reference.py``. What is named after the
linear cross-entropy takes ``softcap``, which makes the logits ``softcap * tanh(logit / softcap)``, and ``backend``, a
name in ``BACKENDS`` or ``auto``; values are float32, or float64 where ``hidden`` is.
"""

import torch
from torch import Tensor

from lvsoftmax.ops.backends import Backends, triton
from lvsoftmax.ops.gradients_in_forward import GradientsInForward, is_differentiated
from lvsoftmax.ops.inputs import check_operands
from lvsoftmax.ops.linear_cross_entropy import gpu, native, reference
from lvsoftmax.ops.linear_cross_entropy.reference import cast
from lvsoftmax.ops.numerics import product_dtype, softplus, sum_dtype, upcast
from lvsoftmax.ops.once_differentiable import once_differentiable

BACKENDS = Backends(triton=triton, cpp=native.LIBRARY.obstacle)

KERNELS = {
    "eager": reference,
    "cpp": native.Kernel("exponential"),
    "triton": gpu,
    "spherical": native.Kernel("spherical"),
    "sigmoidal": native.Kernel("sigmoidal"),
}
"""The backends of the softmax, and the weights other than exponentials that C++ knows: see ``normalised.py``."""


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    *,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return ``-log softmax(hidden @ weight.T + bias)[target]`` of each token, for any upstream gradient.

    The backward pass computes the logits again: four matrix products in all, memory of one block.

    Raises:
        ValueError: operands that do not fit together; a backend that cannot run there.
    """
    nll_N, _ = linear_cross_entropy_and_logsumexp(
        hidden_ND, weight_VD, bias_V, target_N, softcap=softcap, backend=backend
    )
    return nll_N


def linear_logsumexp(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    *,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return ``log(sum(exp(hidden @ weight.T + bias)))`` of each token, for any upstream gradient."""
    target_N = torch.zeros_like(hidden_ND[:, 0], dtype=torch.long)
    _, logsumexp_N = linear_cross_entropy_and_logsumexp(
        hidden_ND, weight_VD, bias_V, target_N, softcap=softcap, backend=backend
    )
    return logsumexp_N


def linear_cross_entropy_and_logsumexp(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    *,
    softcap: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return each token's cross-entropy and log-sum-exp ``l``, for any upstream gradients of both, at the cost of one.

    What composes of them: a penalty ``l^2`` that keeps the normaliser near one (z-loss), or smoothed labels,
    ``(1 - s) nll + s (l - mean logit)`` with ``mean logit = hidden @ weight.mean(0) + bias.mean()`` where no cap is.
    """
    _check(hidden_ND, weight_VD, bias_V, target_N, softcap)
    kernel = BACKENDS.choose(backend, hidden_ND.device.type)
    return per_token(hidden_ND, weight_VD, bias_V, target_N, softcap or 0.0, kernel)


def linear_cross_entropy_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    token_weight_N: Tensor,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return ``sum(token_weight * (nll + z_loss * logsumexp^2))`` as a scalar, to be differentiated at most once.

    The weights are known beforehand, so the gradients are computed during the forward pass from each block of
    exponentials while it is there: three matrix products in all, memory of one block and of the gradients.
    """
    _check(hidden_ND, weight_VD, bias_V, target_N, softcap, token_weight_N)
    kernel = BACKENDS.choose(backend, hidden_ND.device.type)
    return weighted_sum(hidden_ND, weight_VD, bias_V, target_N, token_weight_N, softcap or 0.0, z_loss, kernel)


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Return ``softcap * tanh(logits / softcap)``, which is within ``+-softcap``; the logits themselves for None."""
    return logits if softcap is None else softcap * torch.tanh(upcast(logits) / softcap)


def per_token(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, parameter: float, kernel: str
) -> tuple[Tensor, Tensor]:
    """Return each token's cross-entropy and the log of its sum of weights, by one of ``KERNELS``."""
    return _PerToken.apply(hidden_ND, weight_VD, bias_V, target_N, parameter, kernel)


def weighted_sum(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    token_weight_N: Tensor,
    parameter: float,
    z_loss: float,
    kernel: str,
) -> Tensor:
    """Return ``sum(token_weight * (nll + z_loss * log_sum^2))``, to be differentiated at most once, by a kernel."""
    token_weight_N = token_weight_N.to(sum_dtype(hidden_ND))
    if not is_differentiated(hidden_ND, weight_VD, bias_V):
        nll_N, log_sum_N = per_token(hidden_ND, weight_VD, bias_V, target_N, parameter, kernel)
        return (token_weight_N * (nll_N + z_loss * log_sum_N.square())).sum()
    return _WeightedSum.apply(hidden_ND, weight_VD, bias_V, token_weight_N, target_N, parameter, z_loss, kernel)


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, target_N, parameter, kernel):
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.parameter, ctx.kernel = product_dtype(hidden_ND), parameter, kernel
        operands = hidden_ND, weight_VD, bias_V, target_N
        others_N, target_log_weight_N = KERNELS[kernel].sums(ctx.dtype, *operands, parameter)
        ctx.save_for_backward(*operands, others_N, target_log_weight_N)
        return softplus(others_N - target_log_weight_N), torch.logaddexp(others_N, target_log_weight_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_nll_N, of_log_sum_N):
        *operands, others_N, target_log_weight_N = ctx.saved_tensors
        zero = torch.zeros_like(others_N)
        of_nll_N = zero if of_nll_N is None else of_nll_N
        of_log_sum_N = zero if of_log_sum_N is None else of_log_sum_N
        # p and 1 - p of the target, both to the last digit.
        hit_N, miss_N = torch.sigmoid(target_log_weight_N - others_N), torch.sigmoid(others_N - target_log_weight_N)
        gradients = KERNELS[ctx.kernel].gradients(
            ctx.dtype,
            *operands,
            ctx.parameter,
            others_N.clamp(min=torch.finfo(others_N.dtype).min),
            (of_nll_N + of_log_sum_N) * miss_N,
            of_log_sum_N * hit_N - of_nll_N * miss_N,
            ctx.needs_input_grad[:3],
        )
        return *cast(gradients, *operands[:3]), None, None, None


class _WeightedSum(GradientsInForward):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, token_weight_N, target_N, parameter, z_loss, kernel):
        dtype = product_dtype(hidden_ND)
        operands = hidden_ND, weight_VD, bias_V, target_N
        needed = ctx.needs_input_grad[:3]
        value_N, gradients = KERNELS[kernel].weighted(dtype, *operands, parameter, token_weight_N, z_loss, needed)
        ctx.gradients = (*cast(gradients, *operands[:3]), value_N if ctx.needs_input_grad[3] else None)
        return (token_weight_N * value_N).sum()


def _check(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    softcap: float | None,
    token_weight_N: Tensor | None = None,
) -> None:
    check_operands(hidden_ND, weight_VD, bias_V, target_N, token_weight_N)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}: must be positive; None leaves the logits as they are")
