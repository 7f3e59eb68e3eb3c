"""Gradients that cannot be differentiated again: asking for it is an error."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let the ``backward`` of an autograd function refuse to be recorded.

    PyTorch's decorator of this name lets gradients pass for constants if no upstream gradient has a gradient itself,
    and that is how every loss starts: a second derivative would lack what goes through them, in silence.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *upstream: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "create_graph=True: this operation can be differentiated once; leave it out, or take the objective "
                "from log_prob, which in most layers can be differentiated again"
            )
        with torch.no_grad():
            return backward(ctx, *upstream)

    return once
