"""Logits of words that differ from token to token."""

import torch
from torch import Tensor

from lvsoftmax.ops.backends import Backends, triton
from lvsoftmax.ops.gather_dot import gpu, native, reference
from lvsoftmax.ops.inputs import check_operands, check_pairs

__all__ = ["BACKENDS", "gather_dot"]

BACKENDS = Backends(triton=triton, cpp=native.LIBRARY.obstacle)

KERNELS = {"eager": reference, "cpp": native, "triton": gpu}


def gather_dot(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    ids_NK: Tensor,
    *,
    sparse: bool,
    backend: str = "auto",
) -> Tensor:
    """Return ``hidden[n] . weight[ids[n, k]] + bias[ids[n, k]]``, ``[N, K]`` in float32 at least.

    Cost: ``6 D`` FLOPs per pair of a token and a word for a training step, memory ``O(N K)`` and the gradients. With
    ``sparse`` those of weight and bias are coalesced COO tensors of the words that occur. A compiler sees the
    reference; ``sparse`` breaks its graph.

    Args:
        hidden_ND: hidden vectors.
        weight_VD: the table.
        bias_V: one number per word, or None for zeros.
        ids_NK: each token's words.
        sparse: whether the gradients of table and bias are row-sparse.
        backend: a name in ``BACKENDS`` or ``auto``.

    Raises:
        ValueError: operands that do not fit together; more than 2^31 pairs; a backend that cannot run there.
    """
    check_operands(hidden_ND, weight_VD, bias_V, ids_NK, name="ids")
    check_pairs("ids", ids_NK.numel())
    chosen = BACKENDS.choose(backend, hidden_ND.device.type)
    traced = torch.compiler.is_compiling() and not sparse
    return (reference if traced else KERNELS[chosen]).gather_dot(hidden_ND, weight_VD, bias_V, ids_NK, sparse=sparse)
