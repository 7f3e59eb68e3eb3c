"""What the methods of a layer are given, checked: once for a call, however many of each other they call."""

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lvsoftmax.ops.inputs import check_argument, check_hidden, check_vocabulary, check_words

CHECKED = {"log_prob", "nll", "topk", "sample", "log_partition", "log_prob_and_partition", "draw", "forward", "loss"}
"""Methods of a layer that take hidden vectors."""

_running = threading.local()
"""``layer``: the one whose method this thread runs. It has been given what its own calls of other methods hand on."""


def check_methods(cls: type[nn.Module]) -> None:
    """Let the methods that a class of layers defines check what they are given."""
    for name in CHECKED & vars(cls).keys():
        setattr(cls, name, _checked(vars(cls)[name]))


def _checked(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method of a layer with its inputs checked first, unless another method of the layer calls it."""
    names = list(inspect.signature(method).parameters)[1:]

    @functools.wraps(method)
    def checked(self: nn.Module, *args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return method(self, *args, **options)
        outer = getattr(_running, "layer", None)
        if outer is self:
            return method(self, *args, **options)
        _check_inputs(self, **dict(zip(names, args, strict=False)), **options)
        _running.layer = self
        try:
            return method(self, *args, **options)
        finally:
            _running.layer = outer

    return checked


def _check_inputs(
    layer: Any,
    hidden: Tensor,
    target: Tensor | None = None,
    weight: Tensor | None = None,
    previous: Tensor | None = None,
    k: int | None = None,
    **_: Any,
) -> None:
    check_hidden(hidden, layer.hidden_size)
    own = next(layer.parameters(), hidden)  # a layer may have none
    tokens, device = len(hidden), own.device
    check_argument("hidden", hidden, hidden.shape, device, "the layer")
    _check_types(hidden.dtype, own.dtype, device.type)
    if k is not None and not 0 <= k <= layer.vocab_size:
        raise ValueError(f"k={k}: must be from 0 to {layer.vocab_size}, the number of words")
    for name, words in (("target", target), ("previous", previous)):
        if words is not None:
            check_argument(name, words, (tokens,), device, "the layer")
            check_words(name, words)
            check_vocabulary(name, words, layer.vocab_size)
    if weight is not None:
        check_argument("weight", weight, (tokens,), device, "the layer")


def _check_types(hidden: torch.dtype, layer: torch.dtype, device: str) -> None:
    if hidden == layer:
        return
    if torch.float64 in (hidden, layer):
        raise ValueError(f"hidden has type {hidden} and the layer {layer}; cast one, which torch.autocast does not")
    if not torch.is_autocast_enabled(device):
        raise ValueError(f"hidden has type {hidden} and the layer {layer}; cast one, or use torch.autocast")
