"""Updates of some rows of a table in plain PyTorch, in place.

Letters: V rows of the table and its state, D numbers in each; U of the rows, each once, have gradients. Every function
takes ``table [V, ...]``, states of its shape, ``row_U`` and ``gradient [U, ...]``. A state of squares may have one
number per row, ``[V, 1, ...]``: the mean over the row takes the place of the squares.

Everything is computed in float32 at least, and rounded once where the table is less precise. Nothing is written before
everything has been computed, so that running out of memory leaves table and state as they were.
"""

from torch import Tensor

from lvsoftmax.ops.numerics import upcast


def sgd_rows(
    table: Tensor, velocity: Tensor | None, row_U: Tensor, gradient: Tensor, *, lr: float | Tensor, momentum: float,
    decay: float,
) -> None:  # fmt: skip
    """``m <- momentum m + g + decay p``, ``p <- p - lr m`` in the rows."""
    update = _with_decay(table, row_U, upcast(gradient), decay)
    if velocity is not None:
        update = velocity.index_select(0, row_U).mul_(momentum).add_(update)
    subtract_rows(table, row_U, update, lr)
    if velocity is not None:
        velocity.index_copy_(0, row_U, update)


def adagrad_rows(
    table: Tensor, sum: Tensor, row_U: Tensor, gradient: Tensor, *, lr: float | Tensor, epsilon: float, decay: float
) -> None:
    """``g <- g + decay p``, ``s <- s + g^2``, ``p <- p - lr g / (sqrt(s) + epsilon)`` in the rows."""
    gradient = _with_decay(table, row_U, upcast(gradient), decay)
    taken = sum.index_select(0, row_U).add_(_squares(gradient, sum))
    subtract_rows(table, row_U, gradient / taken.sqrt().add_(epsilon), lr)
    sum.index_copy_(0, row_U, taken)


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
    gradient = upcast(gradient)
    moment = first.index_select(0, row_U).lerp_(gradient, 1 - beta1)
    squares = second.index_select(0, row_U).mul_(beta2).add_(_squares(gradient, second), alpha=1 - beta2)
    denominator = squares.div(corrections[1]).sqrt_().add_(epsilon)
    update = moment.div(corrections[0]).div_(denominator)
    subtract_rows(table, row_U, _with_decay(table, row_U, update, decay), lr)
    first.index_copy_(0, row_U, moment)
    second.index_copy_(0, row_U, squares)


def subtract_rows(table: Tensor, row_U: Tensor, update: Tensor, lr: float | Tensor) -> None:
    """``p <- p - lr update`` in the rows."""
    if table.dtype != update.dtype:
        table.index_copy_(0, row_U, upcast(table.index_select(0, row_U)).sub_(update * lr).to(table.dtype))
    elif isinstance(lr, Tensor):  # alpha would need its value on the host
        table.index_add_(0, row_U, update * lr, alpha=-1.0)
    else:
        table.index_add_(0, row_U, update, alpha=-lr)


def _with_decay(table: Tensor, row_U: Tensor, update: Tensor, decay: float) -> Tensor:
    return update.add(upcast(table.index_select(0, row_U)), alpha=decay) if decay else update


def _squares(gradient: Tensor, like: Tensor) -> Tensor:
    """Return the squares, or their means over rows where ``like`` has one number per row."""
    squares = gradient.square()
    return (
        squares if like.shape[1:] == gradient.shape[1:] else squares.mean(tuple(range(1, squares.ndim)), keepdim=True)
    )
