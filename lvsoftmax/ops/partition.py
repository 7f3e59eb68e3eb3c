"""Counts to bands and binary trees: NumPy arrays of integers, computed once when a layer is built.

A binary tree over V words has V - 1 inner nodes, numbered from the root (node 0) level by level, from left to right,
so that every level is a slice. Node ``n`` has the branches ``2 n`` and ``2 n + 1``; a tree is the list of the branches
from which its nodes and its words hang.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np


class Tree(NamedTuple):
    """A binary tree over words.

    ``branch >> 1`` is the parent, ``branch & 1`` the side. The root hangs from no branch: ``node_branch[0] = -1``. In
    level order ``node_branch`` increases.
    """

    node_branch: np.ndarray  # [vocab - 1] int32
    word_branch: np.ndarray  # [vocab] int32


def huffman_tree(counts: np.ndarray) -> Tree:
    """Return the tree with the least expected depth under ``counts`` (Huffman 1952), ties broken for the least depth.

    All pending items that weigh no more than the two lightest together are paired off at once: whatever their pairs
    weigh, the pairs come after them. The least weight doubles every two rounds, so that ``O(log(total / least))``
    rounds of array operations do what the usual queue does in V steps.

    Args:
        counts: ``[vocab]`` non-increasing, not negative.
    """
    vocab = len(counts)
    weight, item = np.asarray(counts, np.float64)[::-1], ~np.arange(vocab)[::-1]  # word w is the item ~w, node n is n
    children = np.empty((vocab - 1, 2), np.int64)
    made = 0
    while len(item) > 1:
        light = np.searchsorted(weight, weight[0] + weight[1], side="right") // 2 * 2
        pair_weight = weight[:light:2] + weight[1:light:2]
        pair = np.arange(made, made + light // 2)
        children[pair] = item[:light].reshape(-1, 2)
        made += light // 2
        place = np.searchsorted(weight[light:], pair_weight, side="right")
        weight, item = np.insert(weight[light:], place, pair_weight), np.insert(item[light:], place, pair)

    def open_nodes(node: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        child = children[node].ravel()
        return child, np.where(child < 0, ~child, -1)

    return _number(vocab, item, open_nodes)


def balanced_tree(order: np.ndarray) -> Tree:
    """Return the tree that halves ``order`` again and again: every word at depth floor or ceil of log2 V.

    Args:
        order: ``[vocab]`` the words in the order of the leaves: frequency ranks for a tree whose first decision is
            frequent or rare, a random permutation for the random tree of Mnih & Hinton 2009.
    """

    def open_spans(span: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _cut(order, span, (span[:, 0] + span[:, 1] + 1) // 2)

    return _number(len(order), np.array([[0, len(order)]]), open_spans)


def clustered_tree(embeddings: np.ndarray, counts: np.ndarray, iterations: int = 8) -> Tree:
    """Return the tree of recursive two-means on word vectors, each cut leaving half of the mass on either side.

    Words are assigned in the order of their projection on the difference of the two means, up to the word where half of
    the cluster's mass is reached. Hence, as in a Huffman tree, a word's depth is about ``-log2`` of its frequency (each
    count raised by one), whatever the vectors; Mnih & Hinton 2009 (section 5) bound the depth by balancing numbers of
    words instead. A cluster's first direction points from its mean to the word farthest from it. All clusters of a
    level are cut together.

    Args:
        embeddings: ``[vocab, width]`` one vector per word.
        counts: ``[vocab]`` not negative.
        iterations: rounds of assignment and means per cut, at most.
    """
    vocab = len(counts)
    vectors = np.ascontiguousarray(embeddings, np.float32)
    mass = np.asarray(counts, np.float64) + 1
    order = np.arange(vocab)

    def open_clusters(span: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        size = span[:, 1] - span[:, 0]
        first = np.cumsum(size) - size
        cluster = np.repeat(np.arange(len(span)), size)
        position = np.arange(len(cluster)) + np.repeat(span[:, 0] - first, size)
        word = order[position]
        x = vectors[word]
        spread = x - _means(x, first, size)[cluster]
        distance = np.einsum("we,we->w", spread, spread)
        farthest = np.lexsort((distance, cluster))[first + size - 1]
        direction = spread[farthest]
        middle = first
        for _ in range(iterations):
            sort = np.lexsort((np.einsum("we,we->w", x, direction[cluster]), cluster))
            x, word, before = x[sort], word[sort], word
            middle = _half_mass(mass[word], first, size)
            if np.array_equal(word, before):
                break
            bounds = np.stack([first, middle], 1).ravel()
            sizes = np.stack([middle - first, first + size - middle], 1).ravel()
            mean = _means(x, bounds, sizes)
            direction = mean[1::2] - mean[::2]
        order[position] = word
        return _cut(order, span, span[:, 0] + middle - first)

    return _number(vocab, np.array([[0, vocab]]), open_clusters)


class Levels(NamedTuple):
    """What a pass down a tree, level by level, reads."""

    sizes: list[tuple[int, int]]  # of every level, the number of its nodes and of the words that hang from them
    node_position: np.ndarray  # [vocab - 1] int32: which of the branches of the level above leads to the node
    leaf_position: np.ndarray  # [vocab] int32: the same of the leaves, by level and from left to right
    word_leaf: np.ndarray  # [vocab] int32: the word's leaf in this order


def levels(tree: Tree) -> Levels:
    """Lay a tree out for a pass down its levels."""
    bounds = _level_bounds(tree)
    word = np.argsort(tree.word_branch)
    leaf_branch = tree.word_branch[word]
    word_leaf = np.empty_like(tree.word_branch)
    word_leaf[word] = np.arange(len(word))

    def position(branch: np.ndarray) -> np.ndarray:
        return branch - 2 * bounds[np.searchsorted(bounds, branch >> 1, side="right") - 1].astype(np.int32)

    leaves = np.diff(np.searchsorted(leaf_branch, 2 * bounds))
    sizes = list(zip(np.diff(bounds).tolist(), leaves.tolist(), strict=True))
    return Levels(sizes, position(tree.node_branch), position(leaf_branch), word_leaf)


def log_odds(tree: Tree, counts: np.ndarray) -> np.ndarray:
    """Return ``log(mass under branch 0 / mass under branch 1)`` of every node, each count raised by one."""
    mass = branch_mass(tree, counts)
    return np.log(mass[::2]) - np.log(mass[1::2])


def paces(tree: Tree, counts: np.ndarray) -> np.ndarray:
    """Return ``min(1, sqrt(mass of the most frequent word / mass under the node))`` of every node."""
    mass = branch_mass(tree, counts).reshape(-1, 2).sum(1)
    return np.sqrt(np.minimum(1, (np.max(counts) + 1) / mass))


def branch_mass(tree: Tree, counts: np.ndarray) -> np.ndarray:
    """Return the sum of the counts, each raised by one, of the words under every branch."""
    mass = np.empty(2 * len(tree.node_branch))
    mass[tree.word_branch] = np.asarray(counts, np.float64) + 1
    bounds = _level_bounds(tree)
    for first, last in zip(bounds[-2:0:-1], bounds[:1:-1], strict=True):
        mass[tree.node_branch[first:last]] = mass[2 * first : 2 * last].reshape(-1, 2).sum(1)
    return mass


def bands(
    counts: np.ndarray, shares: Sequence[float], share_of: Literal["vocabulary", "mass"] = "vocabulary"
) -> np.ndarray:
    """Cut ranked words into contiguous bands.

    Args:
        counts: ``[vocab]`` non-increasing.
        shares: what each band takes, positive, together 1.
        share_of: of what: the number of words, or their mass in ``counts`` (a band ends with the word that reaches
            its share).

    Returns:
        ``[len(shares) + 1]`` bounds from 0 to vocab, never falling; a band may be empty where the vocabulary is small.

    Raises:
        ValueError: the shares are not positive or do not cover the vocabulary.
    """
    shares = list(shares)
    if not shares or min(shares) <= 0 or not np.isclose(sum(shares), 1):
        raise ValueError(f"bands={shares} must cover the vocabulary: give positive shares whose sum is 1")
    reached = np.cumsum(shares)[:-1]
    if share_of == "vocabulary":
        inner = np.rint(reached * len(counts)).astype(np.int64)
    else:
        mass = np.cumsum(np.asarray(counts, np.float64))
        inner = 1 + np.searchsorted(mass, reached * mass[-1])
    return np.concatenate(([0], inner, [len(counts)]))


def _level_bounds(tree: Tree) -> np.ndarray:
    """Return the first node of every level, and at the end the number of nodes."""
    parent = tree.node_branch >> 1
    bounds = [0, 1]
    while bounds[-1] < len(parent):
        bounds.append(1 + int(np.searchsorted(parent[1:], bounds[-1])))
    return np.array(bounds)


def _number(vocab: int, root: np.ndarray, open_level: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Tree:
    """Number a tree's nodes by level.

    ``open_level`` takes the nodes of a level, in whatever form, and returns their children, two for each node in turn,
    and beside each child its word, or -1 where it is a node.
    """
    node_branch, word_branch = np.full(vocab - 1, -1, np.int32), np.empty(vocab, np.int32)
    level, first = root, 0
    while len(level):
        child, word = open_level(level)
        branch = 2 * first + np.arange(len(child))
        leaf = word >= 0
        word_branch[word[leaf]] = branch[leaf]
        first += len(level)
        level = child[~leaf]
        node_branch[first : first + len(level)] = branch[~leaf]
    return Tree(node_branch, word_branch)


def _cut(order: np.ndarray, span: np.ndarray, middle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut spans ``[first, last)`` of ``order``; return the halves, and beside each its word if it has only one."""
    half = np.stack([span[:, 0], middle, middle, span[:, 1]], 1).reshape(-1, 2)
    return half, np.where(half[:, 1] - half[:, 0] == 1, order[half[:, 0]], -1)


def _half_mass(mass: np.ndarray, first: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return where to cut each stretch of ``mass`` to come closest to halves, leaving a word on either side."""
    reached = np.cumsum(mass)
    before = reached[first] - mass[first]
    half = (before + reached[first + size - 1]) / 2
    middle = np.clip(np.searchsorted(reached, half), first, first + size - 2)  # the last word of the left half, if it
    over = reached[middle] - half > half - reached[middle] + mass[middle]  # is not lighter without it
    return np.clip(middle + 1 - over, first + 1, first + size - 1)


def _means(x: np.ndarray, first: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return the means of consecutive stretches of rows."""
    return np.add.reduceat(x, first, axis=0) / size[:, None].astype(x.dtype)
