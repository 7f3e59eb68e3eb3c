"""A Huffman tree as it is usually written: each path padded to the longest, its nodes gathered, gradients dense."""

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.bench.cell import Cell, TorchInstance, problem
from lvsoftmax.ops import partition

VARIANTS = {"padded tree, dense gradients": {"sparse": False}, "padded tree, sparse gradients": {"sparse": True}}
PACKAGE = "torch"
INSTALL = "nothing"
EXACT = False


def build(cell: Cell, *, sparse: bool) -> TorchInstance:
    """Build it."""
    node, sign = (table.to(cell.device) for table in _paths(problem(cell).counts))
    weight = torch.nn.Parameter(torch.empty(cell.vocab - 1, cell.hidden, device=cell.device))
    torch.nn.init.uniform_(weight, -(cell.hidden**-0.5), cell.hidden**-0.5)
    weight.data = weight.data.to(cell.parameter_dtype)

    def values(hidden: Tensor, target: Tensor, previous: Tensor) -> Tensor:
        row = F.embedding(node[target], weight, sparse=sparse)
        score = torch.einsum("nld,nd->nl", row.to(hidden.dtype), hidden) * sign[target]
        return (F.softplus(-score) * sign[target].abs()).sum(1)

    return TorchInstance(cell, [weight], values)


def _paths(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nodes ``[V, L]`` from each word up to the root and the signs of the branches, padded with 0."""
    tree = partition.huffman_tree(counts.double().numpy())
    branch, above = torch.from_numpy(tree.word_branch).long(), torch.from_numpy(tree.node_branch).long()
    nodes, signs = [], []
    while (branch >= 0).any():
        on_path = branch >= 0
        node = (branch >> 1).clamp(min=0)
        nodes.append(node * on_path)
        signs.append((1.0 - 2.0 * (branch & 1)) * on_path)
        branch = torch.where(on_path, above[node], -1)
    return torch.stack(nodes, 1), torch.stack(signs, 1)
