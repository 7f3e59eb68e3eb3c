"""Each token's products with rows of its own, in plain PyTorch.

Letters: N tokens, D hidden, V words, K words of a token, P = N K pairs of a token and a word. See README.md beside this
file for the derivation.
"""

import torch
from torch import Tensor

from lvsoftmax.ops.numerics import upcast
from lvsoftmax.ops.once_differentiable import once_differentiable
from lvsoftmax.ops.pairs import pair_gradients, pair_products


def gather_dot(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, ids_NK: Tensor, *, sparse: bool) -> Tensor:
    """Return ``hidden[n] . weight[ids[n, k]] + bias[ids[n, k]]``, ``[N, K]`` in float32 at least.

    Cost: ``6 D`` FLOPs per pair for a training step, memory ``O(P)`` and the gradients. With ``sparse`` the gradients
    of weight and bias are coalesced COO tensors of the rows that occur. While a graph is traced without ``sparse``,
    ``[N, K, D]`` is gathered, which a compiler fuses with the product; ``sparse`` breaks the graph instead.
    """
    if torch.compiler.is_compiling() and not sparse:
        product_NK = (upcast(weight_VD[ids_NK]) * upcast(hidden_ND)[:, None]).sum(2)
        return product_NK if bias_V is None else product_NK + upcast(bias_V[ids_NK])
    return _in_place(hidden_ND, weight_VD, bias_V, ids_NK, sparse)


@torch.compiler.disable()
def _in_place(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, ids_NK: Tensor, sparse: bool) -> Tensor:
    return _GatherDot.apply(hidden_ND, weight_VD, bias_V, ids_NK, sparse)


class _GatherDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, ids_NK, sparse):
        tokens, words = ids_NK.shape
        bag_N = torch.arange(tokens, device=ids_NK.device) * words
        token_P = torch.arange(tokens, device=ids_NK.device).repeat_interleave(words)
        id_P = ids_NK.reshape(-1)
        logit_P = pair_products(hidden_ND, weight_VD, token_P, id_P, bag_N)
        if bias_V is not None:
            logit_P += bias_V[id_P]
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, token_P, id_P, bag_N)
        ctx.sparse = sparse
        return logit_P.view(tokens, words)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_NK):
        gradients = pair_gradients(
            upstream_NK.reshape(-1), *ctx.saved_tensors, needed=ctx.needs_input_grad, sparse=ctx.sparse
        )
        return *gradients, None, None
