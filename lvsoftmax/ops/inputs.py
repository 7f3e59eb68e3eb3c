"""What operations and layers are given: checks whose messages name the argument.

Word ids outside the vocabulary are looked for on the CPU only: elsewhere that would wait for the device.
"""

from typing import Any

import torch
from torch import Tensor

MOST_PAIRS = 2**31 - 1
"""Of tokens and words, or tokens and nodes, that the kernels can number."""


def check_tensor(name: str, x: Any) -> None:
    """Raise ``ValueError`` unless an argument is a tensor."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}: it must be a torch.Tensor")


def check_hidden(hidden: Any, width: int) -> None:
    """Raise ``ValueError`` unless hidden vectors are floating-point numbers, one row of this width per token."""
    check_tensor("hidden", hidden)
    if hidden.ndim != 2 or hidden.shape[1] != width:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}: it must be [tokens, {width}], a row for each token")
    if not hidden.is_floating_point():
        raise ValueError(f"hidden has type {hidden.dtype}: it must be of floating-point numbers")


def check_argument(name: str, x: Tensor, shape: tuple, device: torch.device, beside: str = "weight") -> None:
    """Raise ``ValueError`` unless an argument has this shape and lies on this device, that of the one named ``beside``.

    What it is compared with is not to blame more than it is; so the message names both.
    """
    check_tensor(name, x)
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, not {tuple(shape)} as hidden and {beside} would have it")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} and {beside} on {device}; move one of them")


def check_words(name: str, x: Tensor) -> None:
    """Raise ``ValueError`` unless an argument has the type of word ids."""
    if x.dtype != torch.int64:
        raise ValueError(f"{name} has type {x.dtype}: word ids must be torch.int64; give {name}.long()")


def check_vocabulary(name: str, x: Tensor, vocab_size: int) -> None:
    """Raise ``ValueError`` for word ids, on the CPU, that are not in the vocabulary."""
    if x.is_cpu and x.numel() and not torch.compiler.is_compiling():
        low, high = torch.aminmax(x)
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"{name} has ids from {low.item()} to {high.item()}: they must be in [0, {vocab_size}); leave out what "
                "is not to be predicted, as in hidden[kept], target[kept] with kept = target >= 0"
            )


def look_up(table_V: Tensor, ids: Tensor) -> Tensor:
    """Return ``table[ids]``, where an id below zero is an error on every device and no place from the end."""
    return table_V.index_select(0, ids.flatten()).view_as(ids)


def check_operands(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    words: Tensor,
    token_weight_N: Tensor | None = None,
    *,
    name: str = "target",
) -> None:
    """Raise ``ValueError`` for operands of a linear layer and its words, ``[N]`` or ``[N, K]``, that do not fit.

    Args:
        hidden_ND: hidden vectors.
        weight_VD: the table.
        bias_V: one number per row of it, or None.
        words: word ids.
        token_weight_N: one number per token, or None.
        name: of the words.
    """
    (rows, width), device = weight_VD.shape, weight_VD.device
    check_hidden(hidden_ND, width)
    tokens = len(hidden_ND)
    check_argument("hidden", hidden_ND, (tokens, width), device)
    if bias_V is not None:
        check_argument("bias", bias_V, (rows,), device)
    check_tensor(name, words)
    check_argument(name, words, (tokens, *words.shape[1:]), device)
    check_words(name, words)
    if token_weight_N is not None:
        check_argument("token_weight", token_weight_N, (tokens,), device)


def check_pairs(name: str, pairs: int) -> None:
    """Raise ``ValueError`` for more pairs than a kernel can number."""
    if pairs > MOST_PAIRS:
        raise ValueError(f"{name} makes {pairs:,} pairs, more than {MOST_PAIRS:,}; take fewer tokens at a time")
