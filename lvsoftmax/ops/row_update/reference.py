"""Adaptive updates of some rows of a table in plain PyTorch, in place.

Letters: V rows of the table and its state, D numbers in each; U of the rows, each once, have gradients. Every function
takes ``table [V, ...]``, states of its shape, ``row_U`` and ``gradient [U, ...]``.
"""

import torch
from torch import Tensor


def adagrad_rows(
    table: Tensor, sum: Tensor, row_U: Tensor, gradient: Tensor, *, lr: float | Tensor, epsilon: float, decay: float
) -> None:
    """``g <- g + decay p``, ``s <- s + g^2``, ``p <- p - lr g / (sqrt(s) + epsilon)`` in the rows."""
    if decay:
        gradient = gradient.add(table.index_select(0, row_U), alpha=decay)
    taken = sum.index_select(0, row_U).addcmul_(gradient, gradient)
    sum.index_copy_(0, row_U, taken)
    denominator = taken.sqrt_().add_(epsilon)
    subtract_rows(table, row_U, torch.div(gradient, denominator, out=denominator), lr)


def adam_rows(
    table: Tensor,
    first: Tensor,
    second: Tensor,
    row_U: Tensor,
    gradient: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    corrections: tuple[Tensor, Tensor],
    epsilon: float,
    decay: float,
) -> None:
    """``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2`` and the step that they give, in the rows.

    With corrections ``c1`` and ``c2`` that is ``p <- p - lr (m / c1 / (sqrt(v / c2) + epsilon) + decay p)``.
    """
    beta1, beta2 = betas
    taken = first.index_select(0, row_U).lerp_(gradient, 1 - beta1)
    first.index_copy_(0, row_U, taken)
    squares = second.index_select(0, row_U).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    second.index_copy_(0, row_U, squares)
    denominator = squares.div_(corrections[1]).sqrt_().add_(epsilon)
    update = taken.div_(corrections[0]).div_(denominator)
    if decay:
        update = update.add(table.index_select(0, row_U), alpha=decay)
    subtract_rows(table, row_U, update, lr)


def subtract_rows(table: Tensor, row_U: Tensor, update: Tensor, lr: float | Tensor) -> None:
    """``p <- p - lr update`` in the rows."""
    if isinstance(lr, Tensor):  # alpha would need its value on the host
        update, lr = update * lr, 1.0
    table.index_add_(0, row_U, update, alpha=-lr)
