"""Weighted sums whose gradients are computed by the forward pass, from what it has at hand, and scaled by the backward.

That takes weights known beforehand, and fixes the number of derivatives to one.
"""

import torch
from torch import Tensor

from lvsoftmax.ops.once_differentiable import once_differentiable


class GradientsInForward(torch.autograd.Function):
    """A scalar. ``forward`` of a subclass leaves the gradients of its first inputs in ``ctx.gradients``.

    None is a gradient that is not needed; the inputs after these have none. Nobody else may hold the gradients.
    """

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        """Scale what ``forward`` has left."""
        # The gradients leave ctx for good: they are scaled in place, and autograd would copy what somebody still holds.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("this loss can be differentiated once; use the per-token one to do it again")
        if not _is_one(upstream):
            gradients = [None if gradient is None else gradient.mul_(upstream) for gradient in gradients]
        return *gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients))


def is_differentiated(*inputs: Tensor | None) -> bool:
    """Return whether a gradient of one of the inputs may be asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _is_one(upstream: Tensor) -> bool:
    """Return whether the gradients are right as they are, where it costs nothing to ask."""
    return upstream.is_cpu and not torch.compiler.is_compiling() and upstream.item() == 1
