"""The hierarchical softmax: a binary tree of logistic decisions."""

import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lvsoftmax.layer import OutputLayer
from lvsoftmax.ops import partition
from lvsoftmax.ops.buffers import empty_table
from lvsoftmax.ops.noise import Sample
from lvsoftmax.ops.path_nll import BACKENDS, path_nll, path_nll_loss, tree_log_prob


class HierarchicalSoftmax(OutputLayer):
    """A word is a path: ``p(w | h) = product over nodes n on the path to w of sigmoid(+-c_n (w_n . h + b_n))``.

    The sign tells the two branches of a node apart. The V words are the leaves of a binary tree, so there are V - 1
    nodes. The tree is fixed:

    - ``huffman``: the least expected path length under the training counts, at most a node above their entropy. It
      leaves open which words share a path: with word vectors, those near in meaning; without, equally frequent ones;
    - ``balanced``: halves of the frequency ranking, all paths about log2 V long;
    - ``random``: halves of a random permutation, drawn from torch's global stream at construction;
    - ``clustered``: recursive two-means on word vectors, so that words near in meaning share a path, each cut halving
      the mass, so that paths are about as short as Huffman's.

    The fixed pace ``c_n = min(1, sqrt(mass of the most frequent word / mass under n))`` lets a tree train at the
    learning rate of a full softmax. Every token trains the root, and at a rate that suits the rows of a softmax table
    the top of a plain tree diverges. The step of gradient descent on ``c_n w_n`` is ``c_n^2`` times that without
    ``c_n``: no node moves faster than the most frequent word's row would. What the layer can represent is unchanged.

    Weights start uniform in ``+-1/sqrt(D)``, a node's bias at the log odds of the counts (each raised by one) under its
    branches, so that the biases alone are the smoothed unigram distribution.

    Cost per token: ``6 D l`` FLOPs for a training step, for a path of ``l`` nodes (expected: the unigram entropy in
    bits, about 10 at V = 33,000, to which ``huffman`` adds less than one); ``2 D V`` for all log-probabilities.

    Reference: Morin & Bengio 2005, Hierarchical Probabilistic Neural Network Language Model, section 3 (their scores
    have a hidden layer that sees a node embedding; here, as in Mnih & Hinton 2009, A Scalable Hierarchical Distributed
    Language Model, section 4, a node has a vector and a bias); Huffman tree: Mikolov et al. 2013, Distributed
    Representations of Words and Phrases, equation 3, where nodes have no bias. The pace is in
    neither.

    Args:
        hidden_size: D.
        counts: ``[vocab]`` training frequency of each word, non-increasing.
        tree: how the tree is built.
        embeddings: one vector per word ``[vocab, any]`` in the order of ``counts``, or the path of an .npy file that
            holds them; for ``huffman`` and ``clustered``. In a run's configuration also ``text``, vectors made from the
            training text, or the folder of a run, vectors of its output layer.
        sparse: row-sparse gradients: a step touches the nodes on its targets' paths only.
        backend: what computes likelihoods along paths: ``triton`` or ``cpp``, kernels for CUDA and the CPU, or
            ``eager``, plain PyTorch; ``auto`` takes a kernel where one can run.

    Raises:
        ValueError: ``tree`` is unknown, or ``clustered`` and there are no usable ``embeddings``; ``backend`` cannot
            run here.
    """

    pace: Tensor
    node_branch: Tensor
    word_branch: Tensor
    level_sizes: list[tuple[int, int]]
    node_position: Tensor
    leaf_position: Tensor
    word_leaf: Tensor
    word_rank: Tensor

    backends = BACKENDS

    def __init__(
        self,
        hidden_size: int,
        counts: Tensor,
        *,
        tree: Literal["huffman", "balanced", "random", "clustered"] = "huffman",
        embeddings: Tensor | str | None = None,
        sparse: bool = True,
        backend: Literal["auto", "eager", "cpp", "triton"] = "auto",
    ) -> None:
        super().__init__(hidden_size, counts, backend=backend)
        self.sparse = sparse
        count = counts.double().cpu().numpy()
        match tree:
            case "huffman":
                if embeddings is None:
                    built = partition.huffman_tree(count)
                else:
                    built = partition.arranged_huffman_tree(
                        partition.word_vectors(embeddings, len(count), "tree=huffman"), count
                    )
            case "balanced":
                built = partition.balanced_tree(np.arange(len(count)))
            case "random":
                built = partition.balanced_tree(torch.randperm(len(count)).numpy())
            case "clustered":
                built = partition.clustered_tree(
                    partition.word_vectors(embeddings, len(count), "tree=clustered"), count
                )
            case _:
                raise ValueError(f"tree={tree!r}: choose huffman, balanced, random or clustered")
        self.register_buffer("node_branch", torch.from_numpy(built.node_branch))
        self.register_buffer("word_branch", torch.from_numpy(built.word_branch))
        self.register_load_state_dict_post_hook(_lay_out)
        _lay_out(self)
        pace = torch.as_tensor(partition.paces(built, count), dtype=torch.get_default_dtype())
        self.register_buffer("pace", pace)
        self.weight = nn.Parameter(empty_table(self.vocab_size - 1, hidden_size))
        self.bias = nn.Parameter(torch.as_tensor(partition.log_odds(built, count), dtype=pace.dtype) / pace)
        nn.init.uniform_(self.weight, -1 / math.sqrt(hidden_size), 1 / math.sqrt(hidden_size))

    def log_prob(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        """Score every node by one product, then pass down the tree."""
        score = self.pace[:, None] * torch.addmm(self.bias[:, None], self.weight, hidden.T)
        return tree_log_prob(
            score,
            self.node_branch,
            self.word_branch,
            self.level_sizes,
            self.node_position,
            self.leaf_position,
            self.word_leaf,
            backend=self.backend,
        )

    def nll(self, hidden: Float[Tensor, "tokens hidden"], target: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
        """Sum the target's path."""
        return path_nll(hidden, *self._operands(), target, sparse=self.sparse, backend=self.backend)

    def loss(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        weight: Float[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Sample | None = None,
    ) -> Float[Tensor, ""]:
        """Return ``sum(weight * nll)``, its gradients taken on the way."""
        return path_nll_loss(hidden, *self._operands(), target, weight, sparse=self.sparse, backend=self.backend)

    def _operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int]:
        """Return parameters, paces and the tree, as the functions of paths take them."""
        parameters, tree = (self.weight, self.bias, self.pace), (self.node_branch, self.word_branch, self.word_rank)
        return *parameters, *tree, len(self.level_sizes)


def _lay_out(layer: HierarchicalSoftmax, _: object = None) -> None:
    """Derive from the tree what the pass down its levels reads; again whenever a tree is loaded."""
    device = layer.node_branch.device
    tree = partition.Tree(layer.node_branch.cpu().numpy(), layer.word_branch.cpu().numpy())
    laid_out = partition.levels(tree)
    layer.level_sizes = laid_out.sizes
    arrays = {name: getattr(laid_out, name) for name in ("node_position", "leaf_position", "word_leaf")}
    for name, array in {**arrays, "word_rank": partition.leaf_ranks(tree)}.items():
        layer.register_buffer(name, torch.from_numpy(array).to(device), persistent=False)
