"""The ``cpp`` backend: ``kernel.cpp``, called with what the functions of ``reference.py`` are called with.

Letters: N tokens, D hidden, V words. Nothing larger than the gradients and ``KEPT`` bytes of weights is held.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lvsoftmax.ops.backends import CppLibrary
from lvsoftmax.ops.buffers import recycled
from lvsoftmax.ops.inputs import check_vocabulary
from lvsoftmax.ops.linear_cross_entropy.reference import only_needed
from lvsoftmax.ops.numerics import softplus

LIBRARY = CppLibrary(Path(__file__).with_name("kernel.cpp"))

KEPT = 168 * 2**20
"""Bytes of exponentials, or other weights' derivatives, that the gradients may find again; see README.md, Backends."""

TOKENS = 512
"""Tokens of a block at most: their hidden vectors, and what is made of them, stay in the second-level cache."""

WHOLE = 32
"""Tokens whose sums fill a row of registers; the kernel rounds a block up to them."""

FEWEST = 128
"""Tokens of a block below which reading and writing the table costs more than computing the logits again."""


class Kernel:
    """A backend: the three functions of ``reference.py``, for one way in which a logit becomes a weight.

    What ``reference.py`` says of the exponentials of logits holds for the weights f(z); the target's logit stands for
    ``log f(z)`` there, and what is ``softcap`` there is the parameter of the weights.

    Args:
        weights: of ``weights.h``: ``exponential`` (the parameter is the cap of the logits, 0 for none), ``spherical``
            (``z^2 + epsilon``; the root of epsilon) or ``sigmoidal`` (``exp(z) sigmoid(z)``; 0).
    """

    def __init__(self, weights: str) -> None:
        self.weights = weights

    def sums(
        self,
        dtype: torch.dtype,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        parameter: float,
    ) -> tuple[Tensor, Tensor]:
        """As in ``reference.py``."""
        operands = _operands(hidden_ND, weight_VD, bias_V, target_N)
        others_N, target_log_weight_N = _sums(*operands, self.weights, parameter, _pairs(dtype))
        return others_N, target_log_weight_N

    def gradients(
        self,
        dtype: torch.dtype,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        parameter: float,
        others_N: Tensor,
        others_factor_N: Tensor,
        target_factor_N: Tensor,
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """As in ``reference.py``."""
        operands = _operands(hidden_ND, weight_VD, bias_V, target_N)
        factors = others_N.contiguous(), others_factor_N.contiguous(), target_factor_N.contiguous()
        made = _gradients(*operands, self.weights, parameter, _pairs(dtype), *factors, list(needed))
        return only_needed(needed, made)

    def weighted(
        self,
        dtype: torch.dtype,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        parameter: float,
        token_weight_N: Tensor,
        z_loss: float,
        needed: Sequence[bool],
    ) -> tuple[Tensor, list[Tensor | None]]:
        """As in ``reference.py``."""
        operands = _operands(hidden_ND, weight_VD, bias_V, target_N)
        options = self.weights, parameter, _pairs(dtype)
        token_weight_N = token_weight_N.to(operands[0].dtype).contiguous()
        value_N, *made = _weighted(*operands, *options, token_weight_N, z_loss, list(needed))
        return value_N, only_needed(needed, made)


def _operands(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return contiguous operands in the precisions that the kernel knows: tables may be bfloat16, the rest is sums."""
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    known = (torch.float32, torch.bfloat16) if dtype == torch.float32 else (dtype,)
    table = weight_VD if weight_VD.dtype in known else weight_VD.to(dtype)
    bias_V = None if bias_V is None else bias_V.to(dtype).contiguous()
    return hidden_ND.to(dtype).contiguous(), table.contiguous(), bias_V, target_N.contiguous()


def _pairs(dtype: torch.dtype) -> bool:
    """Return whether to multiply in bfloat16. Where the processor cannot, float32 is as fast and more accurate."""
    return dtype == torch.bfloat16


# -- operations that compilers and counters see -----------------------------------------------------------------------


@torch.library.custom_op("lvsoftmax::linear_cross_entropy_sums", mutates_args=(), device_types="cpu")
def _sums(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, weights: str, parameter: float, pairs: bool
) -> list[Tensor]:
    others, target_log_weight = torch.empty_like(hidden[:, 0]), torch.empty_like(hidden[:, 0])
    _run(hidden, weight, bias, target, weights, parameter, pairs, others, target_log_weight)
    return [others, target_log_weight]


@torch.library.custom_op("lvsoftmax::linear_cross_entropy_gradients", mutates_args=(), device_types="cpu")
def _gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weights: str,
    parameter: float,
    pairs: bool,
    others: Tensor,
    others_factor: Tensor,
    target_factor: Tensor,
    needed: Sequence[bool],
) -> list[Tensor]:
    made = _room(hidden, weight, needed)
    target_log_weight = torch.empty_like(others)
    none, factors = (None, 0.0), (others_factor, target_factor)
    _run(hidden, weight, bias, target, weights, parameter, pairs, others, target_log_weight, *none, *factors, made)
    return made


@torch.library.custom_op("lvsoftmax::linear_cross_entropy_weighted", mutates_args=(), device_types="cpu")
def _weighted(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weights: str,
    parameter: float,
    pairs: bool,
    token_weight: Tensor,
    z_loss: float,
    needed: Sequence[bool],
) -> list[Tensor]:
    made = _room(hidden, weight, needed)
    others, target_log_weight = torch.empty_like(hidden[:, 0]), torch.empty_like(hidden[:, 0])
    sums = others, target_log_weight
    _run(hidden, weight, bias, target, weights, parameter, pairs, *sums, token_weight, z_loss, gradients=made)
    value = softplus(others - target_log_weight)
    if z_loss:
        value += z_loss * torch.logaddexp(others, target_log_weight).square()
    return [value, *made]


@_sums.register_fake
def _(hidden, weight, bias, target, weights, parameter, pairs):
    return [hidden.new_empty(len(hidden)), hidden.new_empty(len(hidden))]


@_gradients.register_fake
def _(hidden, weight, bias, target, weights, parameter, pairs, others, others_factor, target_factor, needed):
    return [hidden.new_empty(shape) for shape in _shapes(hidden.shape, weight.shape, needed)]


@_weighted.register_fake
def _(hidden, weight, bias, target, weights, parameter, pairs, token_weight, z_loss, needed):
    return [hidden.new_empty(shape) for shape in [hidden.shape[:1], *_shapes(hidden.shape, weight.shape, needed)]]


@register_flop_formula(torch.ops.lvsoftmax.linear_cross_entropy_sums)
def _sums_flops(hidden, weight, *_, **__):
    return 2 * math.prod(hidden) * weight[0]


@register_flop_formula(torch.ops.lvsoftmax.linear_cross_entropy_gradients)
def _gradients_flops(hidden, weight, *rest, **_):
    needed = rest[-1]
    return 2 * math.prod(hidden) * weight[0] * (1 + needed[0] + needed[1])


@register_flop_formula(torch.ops.lvsoftmax.linear_cross_entropy_weighted)
def _weighted_flops(hidden, weight, bias, target, weights, parameter, pairs, token_weight, z_loss, needed, **_):
    _, keeps = _block(hidden[0], weight[0], 2 if pairs else 4, len(needed) > 0)
    return 2 * math.prod(hidden) * weight[0] * (1 + needed[0] + needed[1] + (not keeps))


def _shapes(hidden: Sequence[int], weight: Sequence[int], needed: Sequence[bool]) -> list[Sequence[int]]:
    """Return the shapes of the gradients of hidden, weight and bias, empty where they are not needed."""
    shapes = (tuple(hidden), tuple(weight), (weight[0],))
    return [shape if asked else (0,) for shape, asked in zip(shapes, needed, strict=True)]


def _room(hidden: Tensor, weight: Tensor, needed: Sequence[bool]) -> list[Tensor]:
    return [recycled(shape, hidden.dtype) for shape in _shapes(hidden.shape, weight.shape, needed)]


def _block(tokens: int, vocab: int, entry: int, differentiates: bool) -> tuple[int, bool]:
    """Return the tokens of a block, and whether what the gradients need of its weights is kept for them."""
    kept = KEPT // (entry * vocab) // WHOLE * WHOLE
    keeps = differentiates and kept >= min(tokens, FEWEST)
    most = min(TOKENS, kept) if keeps else TOKENS
    count = -(-tokens // most)
    return -(-tokens // count), keeps


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weights: str,
    parameter: float,
    pairs: bool,
    others: Tensor,
    target_log_weight: Tensor,
    token_weight: Tensor | None = None,
    z_loss: float = 0.0,
    others_factor: Tensor | None = None,
    target_factor: Tensor | None = None,
    gradients: Sequence[Tensor] = (),
) -> None:
    (tokens, width), vocab = hidden.shape, len(weight)
    if tokens == 0:
        for gradient in gradients:
            gradient.zero_()
        return
    check_vocabulary("target", target, vocab)
    product = torch.bfloat16 if pairs and LIBRARY.has("exponential_bfloat16_from_float32") else hidden.dtype
    function = f"{weights}_{_name(product)}_from_{_name(weight.dtype)}"
    size, keeps = _block(tokens, vocab, product.itemsize, differentiates=token_weight is not None)
    needed = [gradient if gradient.numel() else None for gradient in gradients] or [None] * 3
    arguments = (
        *(hidden, weight, bias, target, tokens, width, vocab, parameter, others, target_log_weight, token_weight),
        *(z_loss, others_factor, target_factor, *needed, torch.get_num_threads(), size, keeps),
    )
    workspace = recycled((LIBRARY.call(function, *arguments, None),), torch.uint8)
    LIBRARY.call(function, *arguments, workspace)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
