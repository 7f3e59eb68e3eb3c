"""Softmax within groups of words: of the targets' groups, or of all."""

import torch
from torch import Tensor

from lvsoftmax.ops.backends import Backends, triton
from lvsoftmax.ops.grouped_nll import gpu, reference
from lvsoftmax.ops.grouped_nll.reference import grouped_log_softmax

__all__ = ["BACKENDS", "grouped_log_softmax", "grouped_nll"]

BACKENDS = Backends(triton=triton)


def grouped_nll(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    bound_G: Tensor,
    target_N: Tensor,
    *,
    sparse: bool,
    backend: str = "auto",
) -> Tensor:
    """Return ``-log softmax(scores within the target's group)[target]`` of each token.

    Cost: ``6 D`` FLOPs per pair of a token and a word of its group for a training step, memory of about 50 bytes per
    pair, and the gradients. With ``sparse`` the gradients of weight and bias are coalesced COO tensors of the rows of
    the groups that occur. A compiler sees one operation of the reference, which computes its scores a second time in
    the backward pass; ``sparse`` breaks the graph instead.

    Args:
        hidden_ND: hidden vectors.
        weight_VD: one row per word, the words of a group side by side.
        bias_V: one number per word.
        bound_G: ``[G + 1]`` where groups begin in the table, and V.
        target_N: row of each target in the table.
        sparse: whether gradients of the table are row-sparse.
        backend: a name in ``BACKENDS`` or ``auto``.

    Raises:
        ValueError: a backend that cannot run there.
    """
    chosen = BACKENDS.choose(backend, hidden_ND.device.type)
    code = gpu if chosen == "triton" and (sparse or not torch.compiler.is_compiling()) else reference
    return code.grouped_nll(hidden_ND, weight_VD, bias_V, bound_G, target_N, sparse=sparse)
