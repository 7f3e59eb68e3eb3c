"""What the tests of the fused cross-entropies share: sizes that fit nothing, toy operands, PyTorch's own result."""

import pytest
import torch
import torch.nn.functional as F

from lvsoftmax.ops.linear_cross_entropy import soft_capped

N, D, V = 11, 3, 13
SHAPES = [(1, 1, 2), (33, 17, 131), (70, 65, 400), (100, 32, 56), (5, 100, 999), (64, 31, 225)]


def operands(dtype=torch.float64, tokens=N, hidden=D, vocab=V, scale=1.0):
    hidden_ND = (scale * torch.randn(tokens, hidden, dtype=torch.float64)).to(dtype).requires_grad_()
    weight_VD = torch.randn(vocab, hidden, dtype=torch.float64).to(dtype).requires_grad_()
    bias_V = torch.randn(vocab, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden_ND, weight_VD, bias_V, torch.randint(vocab, (tokens,))


def plain(hidden_ND, weight_VD, bias_V, target_N, softcap=None):
    logits = soft_capped(F.linear(hidden_ND, weight_VD, bias_V), softcap)
    return F.cross_entropy(logits, target_N, reduction="none")


def some_zero(tokens=N, dtype=torch.float64):
    upstream_N = torch.randn(tokens, dtype=dtype)
    upstream_N[::3] = 0
    return upstream_N


def slopes(value, variables, upstream):
    return torch.autograd.grad(value, variables, upstream, retain_graph=True)


def autocast(tensor):
    return torch.autocast(tensor.device.type, torch.bfloat16)


def skip_without_need(backend, *, needed):
    """Skip what would tell nothing new, or take minutes in Triton's interpreter."""
    if backend == "triton" and not needed:
        pytest.skip("tried in one form only")
