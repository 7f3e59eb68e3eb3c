"""Counts to bands, classes and binary trees: NumPy arrays of integers, computed once when a layer is built.

A binary tree over V words has V - 1 inner nodes, numbered from the root (node 0) level by level, from left to right,
so that every level is a slice. Node ``n`` has the branches ``2 n`` and ``2 n + 1``; a tree is the list of the branches
from which its nodes and its words hang.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor


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


def arranged_huffman_tree(embeddings: np.ndarray, counts: np.ndarray, iterations: int = 8) -> Tree:
    """Return a tree of Huffman's depths with words alike in meaning near each other.

    Optimal is every tree that has Huffman's depths ``l``, whichever words it puts together. The words' shares ``2^-l``
    sum to 1, and words can hang from one node at depth ``k`` if their shares sum to ``2^-k``. Hence recursive two-means
    as in :func:`clustered_tree`, with these shares for the mass, but one half of a cluster is filled, in the order of
    projection, with every word that still fits. Exactly half is filled then: if ``r`` of it stayed free, every word
    left out would have a larger share than ``r``; the least of these divides the others and the half, hence ``r``,
    which is less than it and so 0.

    Args:
        embeddings: ``[vocab, width]`` one vector per word.
        counts: ``[vocab]`` non-increasing, not negative.
        iterations: rounds of assignment and means per cut, at most.
    """
    depth = depths(huffman_tree(counts))
    share = 2 ** (depth.max() - depth).astype(object)  # of Python's integers: a depth may exceed 63
    if depth.max() < 63:
        share = share.astype(np.int64)
    return _two_means(embeddings, share, _fill_half, iterations)[0]


def clustered_tree(embeddings: np.ndarray, counts: np.ndarray, iterations: int = 8) -> Tree:
    """Return the tree of recursive two-means on word vectors, each cut leaving half of the mass on either side.

    Words are assigned in the order of their projection on the difference of the two means, up to the word where half of
    the cluster's mass is reached. Hence, as in a Huffman tree, a word's depth is about ``-log2`` of its frequency (each
    count raised by one), whatever the vectors; Mnih & Hinton 2009 (section 5) bound the depth by balancing numbers of
    words instead. Words count by their mass in the means, too: then this assignment is the one, but for the word at the
    cut, that minimises the mean squared distance of a token from its half's mean. A cluster's first direction points
    from its mean to the word farthest from it. All clusters of a level are cut together.

    Args:
        embeddings: ``[vocab, width]`` one vector per word.
        counts: ``[vocab]`` not negative.
        iterations: rounds of assignment and means per cut, at most.
    """
    return _two_means(embeddings, np.asarray(counts, np.float64) + 1, _reach_half, iterations)[0]


def clustered_order(embeddings: np.ndarray, counts: np.ndarray, iterations: int = 8) -> np.ndarray:
    """Return the words in the order of the leaves of :func:`clustered_tree`: alike in meaning, near in order."""
    return _two_means(embeddings, np.asarray(counts, np.float64) + 1, _reach_half, iterations)[1]


def _two_means(
    embeddings: np.ndarray,
    mass: np.ndarray,
    halve: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    iterations: int,
) -> tuple[Tree, np.ndarray]:
    """Return the tree of recursive two-means, and its leaves from left to right.

    ``halve`` says which of the sorted words of each cluster go left.
    """
    vocab = len(mass)
    vectors = np.ascontiguousarray(embeddings, np.float32)
    order = np.arange(vocab)
    is_left = np.zeros(vocab, bool)

    def open_clusters(span: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        size = span[:, 1] - span[:, 0]
        first = np.cumsum(size) - size
        cluster = np.repeat(np.arange(len(span)), size)
        position = np.arange(len(cluster)) + np.repeat(span[:, 0] - first, size)
        word = order[position]
        x = vectors[word]
        weight = (mass[word] / np.maximum.reduceat(mass[word], first)[cluster]).astype(np.float32)
        spread = x - _means(x, weight, first)[cluster]
        distance = np.einsum("we,we->w", spread, spread)
        direction = spread[np.lexsort((distance, cluster))[first + size - 1]]
        middle = first
        for _ in range(iterations):
            sort = np.lexsort((np.einsum("we,we->w", x, direction[cluster]), cluster))
            left = halve(mass[word[sort]], first, size)
            apart = np.argsort(2 * cluster - left, kind="stable")
            sort, left = sort[apart], left[apart]
            x, word, weight = x[sort], word[sort], weight[sort]
            middle = first + np.add.reduceat(left, first, dtype=np.int64)
            if np.array_equal(left, is_left[word]):
                break
            is_left[word] = left
            mean = _means(x, weight, np.stack([first, middle], 1).ravel())
            direction = mean[1::2] - mean[::2]
        order[position] = word
        return _cut(order, span, span[:, 0] + middle - first)

    return _number(vocab, np.array([[0, vocab]]), open_clusters), order


def depths(tree: Tree) -> np.ndarray:
    """Return the number of nodes on the path to each word."""
    return np.searchsorted(_level_bounds(tree), tree.word_branch >> 1, side="right")


def leaf_ranks(tree: Tree) -> np.ndarray:
    """Return the place of each word among the leaves from left to right."""
    bounds = _level_bounds(tree)
    below = np.zeros(2 * len(tree.node_branch), np.int64)  # the number of leaves that hang from each branch
    below[tree.word_branch] = 1
    for first, last in zip(bounds[-2:0:-1], bounds[:1:-1], strict=True):
        below[tree.node_branch[first:last]] = below[2 * first : 2 * last].reshape(-1, 2).sum(1)
    before = np.zeros_like(below)  # the number of those to the left of them
    for first, last in itertools.pairwise(bounds):
        node_before = before[tree.node_branch[first:last]] if first else np.zeros(1, np.int64)
        before[2 * first : 2 * last] = np.stack([node_before, node_before + below[2 * first : 2 * last : 2]], 1).ravel()
    return before[tree.word_branch].astype(np.int32)


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


def cheapest_cuts(head: np.ndarray, tails: np.ndarray) -> list[int]:
    """Cut a vocabulary into a head and tails so that they cost least together, by dynamic programming.

    Args:
        head: ``[E]`` the cost of a head that ends at each of E places, the last of which is the vocabulary's end.
        tails: ``[most, E, E]`` the cost of tail ``k``, counted from 0, that begins at one place and ends at another.

    Returns:
        The places where tails begin, rising; no more than ``most``, and none where the head alone is cheapest.
    """
    places = len(head)
    total, begins, best = head, [], (head[-1], 0)
    forward = np.where(np.arange(places)[:, None] < np.arange(places), 0.0, np.inf)
    for number, tail in enumerate(tails, start=1):
        through = total[:, None] + tail + forward
        begins.append(through.argmin(0))
        total = through.min(0)
        best = min(best, (total[-1], number))
    cuts, end = [], places - 1
    for begin in reversed(begins[: best[1]]):
        end = int(begin[end])
        cuts.append(end)
    return cuts[::-1]


def classes(mass: np.ndarray, number: int) -> np.ndarray:
    """Cut words, in the order given, into classes of about equal mass, each with a word at least.

    Class k ends with the word that reaches ``(k + 1) / number`` of the mass (Mikolov et al. 2011). A word with more
    than its share is a class alone, and so are the words after it until the classes have caught up.

    Args:
        mass: ``[vocab]`` positive.
        number: of classes, at most one per word.

    Returns:
        ``[number + 1]`` rising bounds from 0 to vocab.
    """
    reached = np.cumsum(mass)
    inner = np.arange(1, number)
    bound = 1 + np.searchsorted(reached, inner * reached[-1] / number)
    bound = np.maximum.accumulate(bound - inner) + inner
    return np.concatenate(([0], np.minimum(bound, len(mass) - number + inner), [len(mass)]))


def word_vectors(embeddings: Tensor | str | None, vocab_size: int, option: str) -> np.ndarray:
    """Return vectors that a user gave, a tensor or the path of an .npy file, as an array with one row per word.

    Args:
        embeddings: what was given.
        vocab_size: the number of rows expected.
        option: the setting that needs them, for the message when there are none.

    Raises:
        ValueError: there are none, they cannot be read, or they are not one row of finite numbers per word.
    """
    if embeddings is None:
        raise ValueError(f"embeddings=None: {option} needs a vector per word; give a tensor or the path of an .npy")
    if isinstance(embeddings, str):
        try:
            vectors = np.load(embeddings)
        except (OSError, ValueError) as error:
            raise ValueError(f"embeddings={embeddings!r}: cannot be read; give the path of an .npy file") from error
    else:
        vectors = embeddings.detach().float().cpu().numpy()
    if vectors.ndim != 2 or len(vectors) != vocab_size:
        raise ValueError(f"embeddings has shape {list(vectors.shape)}: give one row for each of the {vocab_size} words")
    if not np.isfinite(vectors).all():
        raise ValueError("embeddings has values that are not finite; remove them")
    return vectors


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


def _reach_half(mass: np.ndarray, first: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return which of the words of each stretch are in its left half.

    These are the first words, so many that their mass comes closest to half; a word is left on either side.
    """
    reached = np.cumsum(mass)
    before = reached[first] - mass[first]
    half = (before + reached[first + size - 1]) / 2
    middle = np.clip(np.searchsorted(reached, half), first, first + size - 2)  # the last word of the left half, if it
    over = reached[middle] - half > half - reached[middle] + mass[middle]  # is not lighter without it
    return np.arange(len(mass)) < np.repeat(np.clip(middle + 1 - over, first + 1, first + size - 1), size)


def _fill_half(mass: np.ndarray, first: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return which of the words of each stretch are in its left half: in turn all that fit.

    Every mass is a power of two, and so is that of a stretch, so that the half is filled exactly. Each round takes the
    words up to the first that does not fit, in all stretches, and sets aside those that will not fit any more. What is
    left has at most half the mass of that one, so that there are no more rounds than different masses.
    """
    left = np.zeros(len(mass), bool)
    room = np.add.reduceat(mass, first) // 2
    place, stretch = np.arange(len(mass)), np.repeat(np.arange(len(first)), size)
    while len(place):
        start = np.flatnonzero(np.diff(stretch, prepend=-1))
        here, pending = stretch[start], mass[place]
        reached = np.cumsum(pending)
        reached -= np.repeat(reached[start] - pending[start], np.diff(start, append=len(place)))
        fits = reached <= room[stretch]
        left[place[fits]] = True
        room[here] -= np.add.reduceat(np.where(fits, pending, 0), start)
        stays = ~fits & (pending <= room[stretch])
        place, stretch = place[stays], stretch[stays]
    return left


def _means(x: np.ndarray, weight: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Return the weighted means of consecutive stretches of rows."""
    return np.add.reduceat(x * weight[:, None], first, axis=0) / np.add.reduceat(weight, first)[:, None]
