"""The ``triton`` backend: ``kernel.py``, called with what the functions of ``reference.py`` are called with.

Letters: N tokens, D hidden, V words, W words of one piece of the table, S parts of a sum. Nothing larger than the
gradients and ``PIECE`` numbers is held. Triton is imported by the first call.

Sums are taken in one order, by no atomic operation: the same call gives the same bits. Nothing waits for the device.
Ids of targets are checked on the CPU only; elsewhere a token whose target does not exist gets the loss NaN.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lvsoftmax.ops.inputs import check_vocabulary
from lvsoftmax.ops.linear_cross_entropy.reference import only_needed
from lvsoftmax.ops.numerics import softplus
from lvsoftmax.ops.tiles import dense_rows, ratio

PIECE = 2**24
"""Entries of ``[N, W]``: derivatives in bfloat16 (32 MiB) stay in the second-level cache of an A100 or H100."""

PROGRAMS = 1024
"""Programs among which the sums of a piece are shared out: several for each processor of any device."""


class Tile(NamedTuple):
    """Tokens, words and columns of one tile, and how a program of it is run."""

    tokens: int
    words: int
    columns: int
    warps: int
    stages: int


TILES = {2: Tile(128, 128, 64, 8, 3), 4: Tile(128, 128, 32, 8, 3), 8: Tile(32, 32, 16, 4, 2)}
"""By the bytes of a factor. The first two hold 96 KiB of factors on the way, which every card since the A100 has."""


def sums(
    dtype: torch.dtype, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    """As in ``reference.py``."""
    others_N, target_logit_N = _sums(*_operands(hidden_ND, weight_VD, bias_V, target_N), softcap, dtype)
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
    """As in ``reference.py``."""
    operands = _operands(hidden_ND, weight_VD, bias_V, target_N)
    factors = others_N.contiguous(), others_factor_N.contiguous(), target_factor_N.contiguous()
    return only_needed(needed, _gradients(*operands, softcap, dtype, *factors, list(needed)))


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
    """As in ``reference.py``."""
    operands = _operands(hidden_ND, weight_VD, bias_V, target_N)
    value_N, *made = _weighted(*operands, softcap, dtype, token_weight_N.contiguous(), z_loss, list(needed))
    return value_N, only_needed(needed, made)


def _operands(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return the operands with their rows in one stretch each; what lies between the rows is no matter."""
    return (
        dense_rows(hidden_ND),
        dense_rows(weight_VD),
        None if bias_V is None else bias_V.contiguous(),
        target_N.contiguous(),
    )


# -- operations that compilers and counters see -----------------------------------------------------------------------


@torch.library.custom_op("lvsoftmax::linear_cross_entropy_triton_sums", mutates_args=())
def _sums(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, softcap: float, dtype: torch.dtype
) -> list[Tensor]:
    from lvsoftmax.ops.linear_cross_entropy import kernel

    check_vocabulary("target", target, len(weight))
    run = _Runner(kernel.sums, softcap, dtype, bias is not None)
    (tokens, width), vocab = hidden.shape, len(weight)
    # A target that no program meets leaves this: no number may pass for the loss of a word that does not exist.
    target_logit = _empty(hidden, (tokens,), run.sum_dtype).fill_(math.nan)
    if tokens == 0:
        return [target_logit.clone(), target_logit]
    factor, tiles = hidden.to(dtype), ratio(tokens, run.tile.tokens)
    rows = vocab if weight.dtype == dtype else max(PIECE // width, 1)  # of what is cast at a time
    parts = []
    for piece in _pieces(vocab, rows):
        table = weight[piece].to(dtype)
        words = ratio(ratio(len(table) * tiles, PROGRAMS), run.tile.words) * run.tile.words
        count = ratio(len(table), words)
        parts.append(_empty(hidden, (count, tokens), run.sum_dtype))
        outputs = (parts[-1], target_logit)
        sizes = (tokens, width, len(table), piece.start, words)
        run(tiles * count, factor, table, None if bias is None else bias[piece], target, *outputs, *sizes)
    return [torch.cat(parts).logsumexp(0), target_logit]


@torch.library.custom_op("lvsoftmax::linear_cross_entropy_triton_gradients", mutates_args=())
def _gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    softcap: float,
    dtype: torch.dtype,
    others: Tensor,
    others_factor: Tensor,
    target_factor: Tensor,
    needed: Sequence[bool],
) -> list[Tensor]:
    from lvsoftmax.ops.linear_cross_entropy import kernel

    run = _Runner(kernel.slopes, softcap, dtype, bias is not None)
    (tokens, width), vocab = hidden.shape, len(weight)
    grad_hidden, grad_weight, grad_bias = _room(hidden, weight, needed)
    if tokens == 0:
        return [grad_hidden, grad_weight.zero_(), grad_bias.zero_()]
    grad_hidden.zero_()
    factor, tiles = hidden.to(dtype), ratio(tokens, run.tile.tokens)
    most = max(PIECE // tokens // run.tile.words, 1) * run.tile.words
    for piece in _pieces(vocab, most):
        table = weight[piece].to(dtype)
        slope = _empty(hidden, (tokens, len(table)), run.slope_dtype)
        slope_sum = _empty(hidden, (tiles if needed[2] else 0, len(table)), run.sum_dtype)
        known = (target, others, others_factor, target_factor)
        sizes = (tokens, width, len(table), piece.start)
        programs = tiles * ratio(len(table), run.tile.words)
        operands = (factor, table, None if bias is None else bias[piece])
        run(programs, *operands, *known, slope, slope_sum, *sizes, SUMMED=needed[2])
        if needed[0]:
            grad_hidden += _product(slope, table.to(slope.dtype), run.sum_dtype)
        if needed[1]:
            grad_weight[piece] = _product(slope.T, factor.to(slope.dtype), run.sum_dtype)
        if needed[2]:
            grad_bias[piece] = slope_sum.sum(0)
    return [grad_hidden, grad_weight, grad_bias]


@torch.library.custom_op("lvsoftmax::linear_cross_entropy_triton_weighted", mutates_args=())
def _weighted(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    softcap: float,
    dtype: torch.dtype,
    token_weight: Tensor,
    z_loss: float,
    needed: Sequence[bool],
) -> list[Tensor]:
    others, target_logit = _sums(hidden, weight, bias, target, softcap, dtype)
    value, logsumexp = softplus(others - target_logit), torch.logaddexp(others, target_logit)
    pull = token_weight.to(others.dtype)
    miss, hit = pull * torch.sigmoid(others - target_logit), pull * torch.sigmoid(target_logit - others)
    slope = 2 * z_loss * logsumexp  # of z_loss * logsumexp^2
    factors = (miss + slope * miss, slope * hit - miss) if z_loss else (miss, -miss)
    finite = others.clamp(min=torch.finfo(others.dtype).min)
    made = _gradients(hidden, weight, bias, target, softcap, dtype, finite, *factors, needed)
    return [value + z_loss * logsumexp.square() if z_loss else value, *made]


@_sums.register_fake
def _(hidden, weight, bias, target, softcap, dtype):
    sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
    return [_empty(hidden, hidden.shape[:1], sum_dtype), _empty(hidden, hidden.shape[:1], sum_dtype)]


@_gradients.register_fake
def _(hidden, weight, bias, target, softcap, dtype, others, others_factor, target_factor, needed):
    return _room(hidden, weight, needed)


@_weighted.register_fake
def _(hidden, weight, bias, target, softcap, dtype, token_weight, z_loss, needed):
    nll = _empty(hidden, hidden.shape[:1], torch.promote_types(hidden.dtype, torch.float32))
    return [nll, *_room(hidden, weight, needed)]


@register_flop_formula(torch.ops.lvsoftmax.linear_cross_entropy_triton_sums)
def _sums_flops(hidden, weight, *_, **__):
    return 2 * math.prod(hidden) * weight[0]


@register_flop_formula(torch.ops.lvsoftmax.linear_cross_entropy_triton_gradients)
def _gradients_flops(hidden, weight, bias, target, softcap, dtype, others, others_factor, target_factor, needed, **_):
    return 2 * math.prod(hidden) * weight[0] * (1 + needed[0] + needed[1])


@register_flop_formula(torch.ops.lvsoftmax.linear_cross_entropy_triton_weighted)
def _weighted_flops(hidden, weight, bias, target, softcap, dtype, token_weight, z_loss, needed, **_):
    return 2 * math.prod(hidden) * weight[0] * (2 + needed[0] + needed[1])


def _room(hidden: Tensor, weight: Tensor, needed: Sequence[bool]) -> list[Tensor]:
    """Return memory for the gradients of hidden, weight and bias, empty where they are not needed."""
    sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dtypes = (sum_dtype, weight.dtype, sum_dtype)  # a row of the table's gradient is written once, others are added to
    return [
        _empty(hidden, shape if asked else (0,), dtype)
        for shape, dtype, asked in zip(shapes, dtypes, needed, strict=True)
    ]


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


# -- how kernels are run ----------------------------------------------------------------------------------------------


class _Runner:
    """Runs a kernel with the options that follow from the precision of the factors.

    Derivatives are stored in it too, but for float16, which has no room for numbers as small as these. The interpreter
    of Triton does not know numbers of 16 bits: there everything is float32.
    """

    def __init__(self, kernel, softcap: float, dtype: torch.dtype, biased: bool) -> None:
        import triton
        import triton.language as tl

        compiled = isinstance(kernel, triton.JITFunction)
        self.kernel = kernel
        self.sum_dtype = torch.promote_types(dtype, torch.float32)
        dot = dtype if compiled else self.sum_dtype
        self.slope_dtype = self.sum_dtype if dot == torch.float16 else dot
        self.tile = TILES[dot.itemsize if compiled else 2]
        exact = torch.get_float32_matmul_precision() == "highest"
        self.options = {
            "SOFTCAP": softcap,
            "BIASED": biased,
            "DOT": getattr(tl, _name(dot)),
            "SUM": getattr(tl, _name(self.sum_dtype)),
            # A product of float32 is made of three in the format of tensor cores, unless one is said to be enough.
            "PRECISION": "ieee" if dot != torch.float32 else "tf32x3" if exact else "tf32",
            "BN": self.tile.tokens,
            "BV": self.tile.words,
            "BD": self.tile.columns,
        }
        if compiled:
            self.options |= {"num_warps": self.tile.warps, "num_stages": self.tile.stages}

    def __call__(self, programs: int, hidden: Tensor, weight: Tensor, *arguments, **more: bool) -> None:
        strides = {"hidden_stride": hidden.stride(0), "weight_stride": weight.stride(0)}
        with torch.cuda.device_of(weight):
            self.kernel[(programs,)](hidden, weight, *arguments, **strides, **self.options, **more)


def _pieces(vocab: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, vocab)) for start in range(0, vocab, size))


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``left @ right``, summed and given in ``dtype``."""
    with torch.autocast(left.device.type, enabled=False):  # which would narrow what is wide on purpose
        return left @ right if left.dtype == dtype else torch.mm(left, right, out_dtype=dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
