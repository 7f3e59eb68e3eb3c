"""Trees and bands against brute force, independent algorithms and what information theory demands of a code."""

import heapq
from functools import cache

import numpy as np
import pytest

from lvsoftmax.ops import partition
from lvsoftmax.ops.partition import (
    arranged_huffman_tree,
    balanced_tree,
    bands,
    clustered_tree,
    huffman_tree,
    levels,
    log_odds,
    paces,
)

RNG = np.random.default_rng(7)


def ranked(counts) -> np.ndarray:
    return np.sort(np.asarray(counts))[::-1]


def zipf(size: int) -> np.ndarray:
    return (3 * size / np.arange(1, size + 1)).astype(np.int64)


def path(tree, word: int) -> list[tuple[int, int]]:
    """Nodes and sides from a word up to the root, step by step."""
    steps, branch = [], int(tree.word_branch[word])
    while branch >= 0:
        steps.append((branch // 2, branch % 2))
        branch = int(tree.node_branch[branch // 2])
    return steps


def depths(tree) -> np.ndarray:
    return np.array([len(path(tree, word)) for word in range(len(tree.word_branch))])


def least_cost(counts: np.ndarray) -> int:
    """Least sum of count x depth over all binary trees, by trying every cut of every set of words."""

    @cache
    def cost(words: tuple[int, ...]) -> int:
        if len(words) == 1:
            return 0
        first, *rest = words
        cuts = []
        for chosen in range(2 ** len(rest) - 1):
            left = (first, *(w for i, w in enumerate(rest) if chosen >> i & 1))
            cuts.append(cost(left) + cost(tuple(w for w in rest if w not in left)))
        return min(cuts) + sum(int(counts[w]) for w in words)

    return cost(tuple(range(len(counts))))


def heap_cost(counts: np.ndarray) -> int:
    """The same by Huffman's algorithm as in textbooks: a node costs its weight."""
    heap, total = [int(count) for count in counts], 0
    heapq.heapify(heap)
    while len(heap) > 1:
        pair = heapq.heappop(heap) + heapq.heappop(heap)
        total += pair
        heapq.heappush(heap, pair)
    return total


COUNTS = {
    "two": [3, 1],
    "one seen": [5, 0],
    "one seen of many": [5] + [0] * 8,
    "equal": [4] * 7,
    "doubling": [64, 32, 16, 8, 4, 2, 1, 1],
    "fibonacci": ranked([1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89]),
    "zipf": zipf(97),
    "ties and zeros": ranked(RNG.integers(0, 4, 60)),
    "deeper than 63": ranked([1, *(int(1.7**k) for k in range(1, 75))]),
    "wide range": [10**12, 10**11, 10**3, 10, 1, 1, 0],
}
for_all_counts = pytest.mark.parametrize("counts", [np.asarray(c) for c in COUNTS.values()], ids=list(COUNTS))


def trees(counts: np.ndarray) -> dict:
    vectors = np.random.default_rng(0).normal(size=(len(counts), 3))
    return {
        "huffman": huffman_tree(counts),
        "huffman arranged": arranged_huffman_tree(vectors, counts),
        "huffman alike": arranged_huffman_tree(np.ones_like(vectors), counts),
        "balanced": balanced_tree(np.arange(len(counts))),
        "random": balanced_tree(np.random.default_rng(1).permutation(len(counts))),
        "clustered": clustered_tree(vectors, counts),
        "clustered alike": clustered_tree(np.ones_like(vectors), counts),
    }


# -- every tree -------------------------------------------------------------------------------------------------------


@for_all_counts
def test_every_branch_leads_to_one_node_or_word_and_levels_are_slices(counts):
    for name, tree in trees(counts).items():
        nodes = len(counts) - 1
        assert tree.node_branch.dtype == tree.word_branch.dtype == np.int32, name
        assert tree.node_branch[0] == -1, name
        used = np.concatenate([tree.node_branch[1:], tree.word_branch])
        assert sorted(used) == list(range(2 * nodes)), name
        assert (np.diff(tree.node_branch) > 0).all(), name
        assert (tree.node_branch >> 1 < np.arange(nodes)).all(), name


@for_all_counts
def test_depths_are_the_lengths_of_the_paths(counts):
    for name, tree in trees(counts).items():
        assert partition.depths(tree).tolist() == depths(tree).tolist(), name


@for_all_counts
def test_ranks_of_leaves_are_those_of_their_paths(counts):
    for name, tree in trees(counts).items():
        from_the_left = sorted(range(len(counts)), key=lambda word: [side for _, side in reversed(path(tree, word))])
        assert np.argsort(partition.leaf_ranks(tree)).tolist() == from_the_left, name


@for_all_counts
def test_a_pass_down_the_levels_meets_every_path(counts):
    for name, tree in trees(counts).items():
        laid_out = levels(tree)
        reached, leaves, node, leaf = [()], [], 0, 0
        for width, leaf_count in laid_out.sizes:
            steps = [way + ((node + i, side),) for i, way in enumerate(reached) for side in (0, 1)]
            leaves += [steps[i] for i in laid_out.leaf_position[leaf : leaf + leaf_count]]
            node, leaf = node + width, leaf + leaf_count
            reached = [steps[i] for i in laid_out.node_position[node : node + 2 * width - leaf_count]]
        assert reached == []
        for word, position in enumerate(laid_out.word_leaf):
            assert list(reversed(leaves[position])) == path(tree, word), name


@for_all_counts
def test_log_odds_are_those_of_the_raised_counts_below(counts):
    for name, tree in trees(counts).items():
        mass = np.zeros((len(counts) - 1, 2))
        for word, count in enumerate(counts):
            for node, side in path(tree, word):
                mass[node, side] += count + 1
        np.testing.assert_allclose(log_odds(tree, counts), np.log(mass[:, 0] / mass[:, 1]), atol=1e-12, err_msg=name)


@for_all_counts
def test_paces_make_every_node_as_slow_as_the_most_frequent_word(counts):
    for name, tree in trees(counts).items():
        mass = np.zeros(len(counts) - 1)
        for word, count in enumerate(counts):
            for node, _ in path(tree, word):
                mass[node] += count + 1
        largest = max(counts) + 1
        pace = paces(tree, np.asarray(counts))
        np.testing.assert_allclose(pace**2 * mass, np.minimum(mass, largest), rtol=1e-12, err_msg=name)


# -- Huffman ----------------------------------------------------------------------------------------------------------


def test_huffman_is_optimal_among_all_trees():
    for size in (2, 3, 4, 5, 6):
        for top in (2, 5, 1000):
            counts = ranked(RNG.integers(0, top, size))
            assert counts @ depths(huffman_tree(counts)) == least_cost(counts)


@for_all_counts
def test_huffman_costs_what_the_textbook_algorithm_does(counts):
    assert counts @ depths(huffman_tree(counts)) == heap_cost(counts)


def test_huffman_on_many_random_counts():
    for size in RNG.integers(2, 300, 60):
        draws = RNG.integers(0, 6, size), (1e6 * RNG.random(size) ** 9).astype(np.int64), RNG.geometric(0.1, size)
        for counts in map(ranked, draws):
            assert counts @ depths(huffman_tree(counts)) == heap_cost(counts)


@for_all_counts
def test_huffman_fills_the_code_and_stays_within_a_bit_of_the_entropy(counts):
    depth = depths(huffman_tree(counts))
    assert (2.0**-depth).sum() == 1
    share = counts / counts.sum()
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
    # below the bound, but for the word that is certain: its code has one digit and no entropy
    assert entropy - 1e-9 <= share @ depth < entropy + 1 + (entropy == 0)
    assert (np.diff(depth)[np.diff(counts) < 0] >= 0).all()


def test_huffman_breaks_ties_for_the_least_depth():
    assert sorted(depths(huffman_tree(np.array([2, 1, 1, 1, 1])))) == [2, 2, 2, 3, 3]
    assert sorted(depths(huffman_tree(np.array([2, 2, 1, 1])))) == [2, 2, 2, 2]


@for_all_counts
def test_arranging_by_meaning_keeps_every_depth(counts):
    expected = depths(huffman_tree(counts))
    for width in (1, 3):
        vectors = np.random.default_rng(width).normal(size=(len(counts), width))
        assert depths(arranged_huffman_tree(vectors, counts)).tolist() == expected.tolist()


def test_arranging_keeps_depths_on_many_random_counts():
    for size in RNG.integers(2, 300, 8):
        for counts in map(ranked, (RNG.integers(0, 6, size), (1e6 * RNG.random(size) ** 9).astype(np.int64))):
            arranged = arranged_huffman_tree(RNG.normal(size=(size, 2)), counts)
            assert depths(arranged).tolist() == depths(huffman_tree(counts)).tolist()


def test_arranging_parts_words_by_meaning_and_not_by_frequency():
    """Four meanings, each with a word of every frequency, by twos near each other."""
    counts = np.repeat([64, 32, 16, 8, 4, 2, 1, 1], 4)
    meaning = np.concatenate([RNG.permutation(4) for _ in range(8)])
    vectors = np.stack([meaning // 2 * 8.0, meaning % 2 * 2.0], 1) + 0.1 * RNG.normal(size=(32, 2))
    tree = arranged_huffman_tree(vectors, counts)
    ends = [list(reversed(path(tree, word))) for word in range(32)]
    assert len({(end[0], m // 2) for end, m in zip(ends, meaning, strict=True)}) == 2
    assert len({(*end[:2], m) for end, m in zip(ends, meaning, strict=True)}) == 4
    by_frequency = [list(reversed(path(huffman_tree(counts), word))) for word in range(32)]
    assert len({(*end[:2], m) for end, m in zip(by_frequency, meaning, strict=True)}) > 4


def test_half_is_filled_in_turn_with_all_that_fits():
    """Random divisions of powers of two, in random order, against the plain loop."""
    stretches, expected = [], []
    for size in RNG.integers(2, 60, 100):
        mass = [2**40]
        while len(mass) < size:
            whole = mass.pop(RNG.integers(len(mass)))
            mass += [whole // 2, whole // 2]
        mass = RNG.permutation(mass)
        room = 2**39
        for m in mass:
            expected.append(m <= room)
            room -= m * expected[-1]
        assert room == 0
        stretches.append(mass)
    size = np.array([len(mass) for mass in stretches])
    left = partition._fill_half(np.concatenate(stretches), np.cumsum(size) - size, size)
    assert left.tolist() == expected


def test_huffman_takes_a_large_vocabulary():
    counts = zipf(200_000)
    tree = huffman_tree(counts)
    assert (np.bincount(tree.word_branch >> 1, minlength=len(counts) - 1) <= 2).all()
    share = counts / counts.sum()
    # what lies below a node is decided there: the nodes' masses sum to the expected depth
    mass = np.zeros(2 * len(tree.node_branch))
    mass[tree.word_branch] = share
    expected = 0.0
    for node in range(len(tree.node_branch) - 1, -1, -1):
        below = mass[2 * node] + mass[2 * node + 1]
        expected += below
        if node:
            mass[tree.node_branch[node]] = below
    entropy = -(share * np.log2(share)).sum()
    assert entropy <= expected < entropy + 0.1


# -- balanced and clustered -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 5, 8, 97])
def test_balanced_depths_are_the_logarithm(size):
    order = np.random.default_rng(size).permutation(size)
    depth = depths(balanced_tree(order))
    assert set(depth) <= {int(np.floor(np.log2(size))), int(np.ceil(np.log2(size)))}
    assert (2.0**-depth).sum() == 1


def test_balanced_leaves_keep_their_order():
    order = np.array([4, 2, 0, 1, 3, 5])
    tree = balanced_tree(order)
    from_the_left = sorted(range(6), key=lambda word: [side for _, side in reversed(path(tree, word))])
    assert from_the_left == order.tolist()


def test_clusters_share_a_subtree():
    """Eight clusters in three dimensions, two to each side of each axis, words shuffled among them."""
    cluster = RNG.permutation(np.repeat(np.arange(8), 16))
    corner = (cluster[:, None] >> np.arange(3) & 1) * [8.0, 4.0, 2.0]
    tree = clustered_tree(corner + 0.1 * RNG.normal(size=corner.shape), np.full(128, 10))
    assert (depths(tree) == 7).all()
    for level, bits in ((1, 1), (2, 3), (3, 7)):
        prefix = [tuple(reversed(path(tree, word)))[:level] for word in range(128)]
        assert len({(p, c & bits) for p, c in zip(prefix, cluster, strict=True)}) == 2**level


def test_means_find_the_clusters_that_an_outlier_hides():
    """The first direction points to the outlier, along which the two clusters overlap."""
    rng = np.random.default_rng(0)
    cluster = np.repeat([-1.0, 1.0], 64)
    vectors = np.stack([cluster + 0.1 * rng.normal(size=128), 0.5 * rng.normal(size=128)], 1)
    vectors[-1] = [4.0, 12.0]
    tree = clustered_tree(vectors, np.full(128, 10))
    side = np.array([path(tree, word)[-1][1] for word in range(128)])
    assert np.array_equal(side, cluster > 0) or np.array_equal(side, cluster < 0)


def test_cluster_paths_are_as_short_as_the_counts_allow():
    counts = zipf(3000)
    share = (counts + 1) / (counts + 1).sum()
    for vectors in (RNG.normal(size=(3000, 6)), np.zeros((3000, 2)), 1.0 * np.arange(3000)[:, None]):
        depth = depths(clustered_tree(vectors, counts))
        assert share @ depth < -(share * np.log2(share)).sum() + 2
        assert (depth <= 2 - 2 * np.log2(share)).all()


# -- bands ------------------------------------------------------------------------------------------------------------


def test_bands_by_words_and_by_mass():
    counts = np.array([50, 20, 10, 10, 5, 5, 0, 0, 0, 0])
    assert bands(counts, [0.1, 0.2, 0.7]).tolist() == [0, 1, 3, 10]
    assert bands(counts, [0.5, 0.3, 0.2], "mass").tolist() == [0, 1, 3, 10]
    assert bands(counts, [0.51, 0.29, 0.2], "mass").tolist() == [0, 2, 3, 10]
    assert bands(counts, [1.0], "mass").tolist() == [0, 10]


@pytest.mark.parametrize("share_of", ["vocabulary", "mass"])
def test_bands_may_be_empty_but_cover_every_vocabulary(share_of):
    for size in (2, 3, 50):
        for shares in ([0.9, 0.05, 0.05], [0.01, 0.01, 0.98], [0.001] * 1000):
            bounds = bands(np.array([10] + [0] * (size - 1)), shares, share_of)
            assert len(bounds) == len(shares) + 1
            assert bounds[0] == 0 and bounds[-1] == size and (np.diff(bounds) >= 0).all()


@pytest.mark.parametrize("shares", [[], [0.5, 0.4], [0.5, 0.6], [1.5, -0.5], [1.0, 0.0], [float("nan"), 0.5]])
def test_bands_that_do_not_cover_the_vocabulary_are_refused(shares):
    with pytest.raises(ValueError, match=r"bands=\[.*sum is 1"):
        bands(np.array([2, 1]), shares)
