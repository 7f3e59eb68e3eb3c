"""Fenchel-Young losses of ``entmax(hidden @ weight.T + bias)`` by blocks of tokens.

Letters: N tokens, D hidden, V words, C tokens of one block, P pairs of a token and a word that can be in its support.

The gradient of the logits, ``p - y``, is zero outside of the supports. Where these are small, one product is left of
the three that a softmax needs; sums over the P pairs do for the other two.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lvsoftmax.ops.gradients_in_forward import GradientsInForward, is_differentiated
from lvsoftmax.ops.inputs import check_operands
from lvsoftmax.ops.linear_cross_entropy.reference import accumulate, blocks, cast, room, zeros
from lvsoftmax.ops.numerics import product_dtype, sum_dtype, upcast
from lvsoftmax.ops.once_differentiable import once_differentiable
from lvsoftmax.ops.pairs import bag_starts, pair_gradients
from lvsoftmax.ops.sparse import FEW, Entries, at_entries, fenchel_young, row_sums, solve

Inputs = tuple[Tensor, Tensor, Tensor | None]

ARRAYS = 4  # of the size of the logits exist at once where supports are wide
PAIRS = 2**22  # that may wait to be summed; each takes 20 bytes, and more when its turn comes


def linear_entmax(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, alpha: float, *, sparse: bool = False
) -> Tensor:
    """Return ``entmax_loss(hidden @ weight.T + bias, target, alpha)`` of each token, for any upstream gradient.

    The backward pass computes the logits again. With ``sparse`` the gradients of weight and bias are row-sparse.
    """
    check_operands(hidden_ND, weight_VD, bias_V, target_N)
    return _PerToken.apply(hidden_ND, weight_VD, bias_V, target_N, alpha, sparse)


def linear_entmax_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    token_weight_N: Tensor,
    alpha: float,
    *,
    sparse: bool = False,
) -> Tensor:
    """Return ``sum(token_weight * linear_entmax)``, to be differentiated at most once; gradients are taken on the way.

    With ``sparse`` the gradients of weight and bias are row-sparse.
    """
    check_operands(hidden_ND, weight_VD, bias_V, target_N, token_weight_N)
    token_weight_N = token_weight_N.to(sum_dtype(hidden_ND))
    if not is_differentiated(hidden_ND, weight_VD, bias_V):
        return (token_weight_N * _PerToken.apply(hidden_ND, weight_VD, bias_V, target_N, alpha, sparse)).sum()
    return _WeightedSum.apply(hidden_ND, weight_VD, bias_V, token_weight_N, target_N, alpha, sparse)


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, target_N, alpha, sparse):
        ctx.settings = alpha, sparse, product_dtype(hidden_ND)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N)
        return _step((hidden_ND, weight_VD, bias_V), target_N, *ctx.settings)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_N):
        hidden_ND, weight_VD, bias_V, target_N = ctx.saved_tensors
        inputs = hidden_ND, weight_VD, bias_V
        _, gradients = _step(inputs, target_N, *ctx.settings, upstream_N=upstream_N, needed=ctx.needs_input_grad[:3])
        return *gradients, None, None, None


class _WeightedSum(GradientsInForward):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, token_weight_N, target_N, alpha, sparse):
        *needed, weight_needed = ctx.needs_input_grad[:4]
        inputs, settings = (hidden_ND, weight_VD, bias_V), (alpha, sparse, product_dtype(hidden_ND))
        loss_N, gradients = _step(inputs, target_N, *settings, upstream_N=token_weight_N, needed=needed)
        ctx.gradients = (*gradients, loss_N if weight_needed else None)
        return (token_weight_N * loss_N).sum()


def _step(
    inputs: Inputs,
    target_N: Tensor,
    alpha: float,
    sparse: bool,
    dtype: torch.dtype,
    upstream_N: Tensor | None = None,
    needed: Sequence[bool] = (),
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the loss of each token and, where ``upstream`` is given, the gradients of hidden, weight and bias needed.

    A block's share in them is gathered as pairs where these are few, and by products elsewhere.
    """
    hidden_ND, weight_VD, bias_V = inputs
    vocab, cast_VD = len(weight_VD), weight_VD.to(dtype)
    loss_N = zeros(target_N, hidden_ND.dtype)
    products: list[Tensor | None] = []
    pairs: list[tuple[Tensor, ...]] = []
    sums: list[list[Tensor | None]] = []
    for block in blocks(len(hidden_ND), ARRAYS * vocab):
        hidden_CD, target_C1 = hidden_ND[block].to(dtype), target_N[block, None]
        logit_CV = upcast(hidden_CD @ cast_VD.T)
        if bias_V is not None:
            logit_CV += bias_V
        entries, probability, log_theta_C1 = solve(logit_CV, alpha, target_C1)
        target_scaled_C1 = (logit_CV.gather(1, target_C1) - entries.largest_N1) * (alpha - 1)
        expected_C1 = row_sums(probability * entries.scaled, entries)
        loss_N[block] = fenchel_young(expected_C1, target_scaled_C1, log_theta_C1, alpha).squeeze(1)
        if upstream_N is None:
            continue
        slope = _slope(entries, probability, target_C1, upstream_N[block, None], vocab)
        # While a graph is traced, nothing may hang on how many there are.
        traced = torch.compiler.is_compiling()
        if entries.place_P is None and (traced or slope.count_nonzero() > FEW * slope.numel()):
            products = products or room(needed, *inputs)
            accumulate(products, block, slope, hidden_CD, cast_VD)
            continue
        slope_P = slope.view(-1)
        kept_P = slope_P.nonzero().squeeze(1)
        place_P = kept_P if entries.place_P is None else entries.place_P[kept_P]
        pairs.append((place_P // vocab + block.start, place_P % vocab, slope_P[kept_P]))
        if sum(len(place_P) for place_P, *_ in pairs) > PAIRS:
            sums.append(_pair_sums(inputs, pairs, needed, sparse))
            pairs = []
    if upstream_N is None:
        return loss_N, [None] * 3
    if pairs:
        sums.append(_pair_sums(inputs, pairs, needed, sparse))
    if products or not sums:
        gradients = cast(products or room(needed, *inputs), *inputs)
        if sparse:
            gradients[1:] = [None if x is None else x.to_sparse(1) for x in gradients[1:]]
        sums.append(gradients)
    return loss_N, [_total(parts) for parts in zip(*sums, strict=True)]


def _total(parts: Sequence[Tensor | None]) -> Tensor | None:
    total = parts[0]
    for part in parts[1:]:
        total = None if total is None or part is None else total + part
    return total


def _pair_sums(
    inputs: Inputs, pairs: Sequence[tuple[Tensor, ...]], needed: Sequence[bool], sparse: bool
) -> list[Tensor | None]:
    """Return the share of some pairs in the gradients of hidden, weight and bias."""
    hidden_ND, weight_VD, bias_V = inputs
    token_P, word_P, slope_P = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    bag_N = bag_starts(token_P.bincount(minlength=len(hidden_ND)))
    return list(
        pair_gradients(slope_P, hidden_ND, weight_VD, bias_V, token_P, word_P, bag_N, needed=needed, sparse=sparse)
    )


def _slope(entries: Entries, probability: Tensor, target_C1: Tensor, upstream_C1: Tensor, vocab: int) -> Tensor:
    """Return ``upstream * (p - y)`` at the entries, in the place of the probabilities.

    The target's is the sum over the others: ``p - 1`` as a difference has no correct digit left as p goes to 1.
    """
    if entries.place_P is None:
        probability.scatter_(1, target_C1, 0.0)
        probability.scatter_(1, target_C1, -probability.sum(1, keepdim=True))
        return probability.mul_(upstream_C1)
    first_C = torch.arange(len(target_C1), device=target_C1.device) * vocab
    own_C = torch.searchsorted(entries.place_P, first_C + target_C1.squeeze(1))
    probability[own_C] = 0.0
    probability[own_C] = -row_sums(probability, entries).squeeze(1)
    return probability.mul_(at_entries(upstream_C1, entries))
