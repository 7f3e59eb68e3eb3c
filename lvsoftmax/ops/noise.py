"""Noise distributions over words: probabilities, tables to draw from, draws on the device, their expected counts.

Letters: V words, K draws. Tables are integers (fixed point), for two reasons: what is drawn follows the stored table
exactly, with no rounding between the draw and its logarithm; and no cast of a module to half precision can touch them.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

FixedNoiseName = Literal["uniform", "log_uniform", "unigram"]

COLUMN = 2**32  # units of probability in one column of an alias table: V * COLUMN fits int64 up to V = 2e9
DRAW = 2**40  # units of one draw in an inclusion table: K * DRAW fits int64 up to K = 8e6


class Sample(NamedTuple):
    """Words drawn from a noise distribution, with what a correction needs to know about them.

    ``log_expected`` is the logarithm of how often a word is expected among the draws: ``log(K q)`` with replacement,
    the log inclusion probability without.
    """

    ids: Tensor  # [K] shared by all tokens, or [tokens, K]
    log_expected: Tensor  # of the drawn words, in the shape of ids
    target_log_expected: Tensor  # [tokens] of the targets

    def first(self, count: int) -> "Sample":
        """Return the first ``count`` of these draws with replacement, as if no more had been drawn."""
        shift = math.log(count / self.ids.shape[-1])
        return Sample(self.ids[..., :count], self.log_expected[..., :count] + shift, self.target_log_expected + shift)

    def uncorrected(self) -> "Sample":
        """Return these draws for objectives that take nothing off the logits."""
        return Sample(self.ids, torch.zeros_like(self.log_expected), torch.zeros_like(self.target_log_expected))


class Selection(NamedTuple):
    """Tokens drawn from those of a call, for objectives that take trouble over a few of them only."""

    tokens: Tensor  # [selected] different positions


Draws = Any
"""The random part of an objective: what a layer's ``draw`` makes and its ``forward`` understands. Mostly a ``Sample``;
None for layers without chance."""


class AliasTable(NamedTuple):
    """A distribution cut into V columns of equal mass, each shared by at most two words."""

    mass: Tensor  # [V] probability of each word in units of 1 / (V * COLUMN)
    threshold: Tensor  # [V] units of column v that belong to word v; the rest belongs to ``alias[v]``
    alias: Tensor  # [V]


def noise_probability(counts: Tensor, noise: FixedNoiseName, power: float = 1.0) -> Tensor:
    """Return ``q [V]``, float64, summing to one and positive everywhere.

    ``q(r) ~ weight(r) ** power`` where the weight of the word of rank ``r`` (from 0) is

    - ``uniform``: 1;
    - ``log_uniform``: ``log((r + 2) / (r + 1))``, about Zipf's law, as TensorFlow's log-uniform sampler has it;
    - ``unigram``: its count, words never seen counting as seen once, so that no target has probability zero.

    Raises:
        ValueError: ``power`` is negative or not finite, or ``noise`` is not one of the names.
    """
    if not (math.isfinite(power) and power >= 0):
        raise ValueError(f"power={power}: must be finite and not negative; 1 keeps the distribution as it is")
    rank_V = torch.arange(len(counts), dtype=torch.float64, device=counts.device)
    if noise == "uniform":
        log_weight_V = torch.zeros_like(rank_V)
    elif noise == "log_uniform":
        log_weight_V = (1 / (rank_V + 1)).log1p().log()
    elif noise == "unigram":
        log_weight_V = counts.double().clamp(min=1).log()
    else:
        raise ValueError(f"noise={noise!r}: must be uniform, log_uniform or unigram")
    return torch.softmax(power * log_weight_V, 0)


def sample_count(name: str, value: int | float, whole: int, of: str = "the vocabulary") -> int:
    """Return a number of words given absolutely (int) or as a share of the whole (float in (0, 1], rounded up).

    Raises:
        ValueError: ``value`` is neither.
    """
    if isinstance(value, float) and 0 < value <= 1:
        return max(math.ceil(round(value * whole, 6)), 1)  # 0.07 of 100 is 7, not 7.000000000000001
    if isinstance(value, int) and value >= 1:
        return value
    raise ValueError(f"{name}={value}: must be a whole number of at least 1 or a share of {of} in (0, 1]")


def alias_table(probability_V: Tensor) -> AliasTable:
    """Build the table from which one draw costs two random numbers and two look-ups (Walker 1977; Vose 1991)."""
    vocab_size = len(probability_V)
    mass_V = _apportion(probability_V, vocab_size * COLUMN, vocab_size * COLUMN)
    return AliasTable(mass_V, *alias_columns(mass_V))


def alias_columns(mass_P: Tensor) -> tuple[Tensor, Tensor]:
    """Return the thresholds and aliases of one or more distributions, one after the other in ``mass``.

    Each has as many columns as words, and masses that sum to ``COLUMN`` times that.

    Vectorised: columns are filled in order, light words (below one column) from heavy ones. With ``D`` the running
    sum of what the light words lack and ``E`` that of what the heavy words have to spare, a light word is filled
    by the first heavy word whose ``E`` exceeds the ``D`` before it; a heavy word is itself the lighter part of its
    column once ``D`` has reached its ``E``, and the next heavy word fills it (the sweep of Hübschle-Schneider &
    Sanders 2019, Parallel Weighted Random Sampling, section 4). In integers every column comes out exactly full, and
    ``D = E`` where a distribution ends: one sweep serves them all.
    """
    threshold_P = mass_P.clone()
    alias_P = torch.arange(len(mass_P), device=mass_P.device)
    light = (mass_P < COLUMN).nonzero().squeeze(1)
    heavy = (mass_P >= COLUMN).nonzero().squeeze(1)
    lack = COLUMN - mass_P[light]
    lacked = torch.cat([lack.new_zeros(1), lack.cumsum(0)])
    spared = (mass_P[heavy] - COLUMN).cumsum(0)
    alias_P[light] = heavy[torch.searchsorted(spared, lacked[:-1], right=True)]
    alias_P[heavy[:-1]] = heavy[1:]
    threshold_P[heavy] = COLUMN + spared - lacked[torch.searchsorted(lacked, spared)]
    return threshold_P, alias_P


def draw_independent(table: AliasTable, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw ids with replacement, in O(1) each."""
    device = table.mass.device
    column = torch.randint(len(table.mass), shape, generator=generator, device=device)
    height = torch.randint(COLUMN, shape, generator=generator, device=device)
    return torch.where(height < table.threshold[column], column, table.alias[column])


def log_expected_count(mass_V: Tensor, ids: Tensor, count: int) -> Tensor:
    """Return ``log(K q)`` of ``ids`` under ``count`` draws from an alias table with these masses."""
    return (mass_V[ids].float() / COLUMN).log() + math.log(count / len(mass_V))


def log_inclusion(log_expected: Tensor, count: int) -> Tensor:
    """Return ``log(1 - (1 - q)^K)``, how likely ``count`` independent draws hold a word at least once.

    Args:
        log_expected: ``log(K q)``.
        count: K.
    """
    log_missed = count * torch.log1p(-(log_expected.exp() / count).clamp(max=1))
    return (-torch.expm1(log_missed)).log()


def inclusion_mass(probability_V: Tensor, count: int) -> Tensor:
    """Return the probabilities ``pi [V]`` that words are among ``count`` distinct draws, in units of ``1 / DRAW``.

    ``pi = min(1, c q)`` with the ``c`` that makes the sum ``count``: words with ``c q >= 1`` are in every draw, the
    others in proportion to ``q``.

    Raises:
        ValueError: ``count`` exceeds the vocabulary.
    """
    if count > len(probability_V):
        raise ValueError(
            f"samples={count}: more than the {len(probability_V)} words there are to draw without replacement; "
            "lower samples, or draw with replacement where the layer can"
        )
    falling_V = probability_V.sort(descending=True).values
    left_V = falling_V.flip(0).cumsum(0).flip(0)  # mass of the words from each rank on
    certain_V = torch.arange(len(falling_V), dtype=torch.float64, device=falling_V.device)
    scale_V = (count - certain_V) / left_V  # c, were all the words before this rank certain
    enough = (scale_V * falling_V < 1).nonzero()
    inclusion_V = (scale_V[enough[0]] * probability_V).clamp(max=1) if len(enough) else torch.ones_like(probability_V)
    return _apportion(inclusion_V, count * DRAW, DRAW)


def draw_distinct(reached_V: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw ids that are distinct along the last dimension, each word with exactly its inclusion probability.

    Deville's systematic sampling (Deville 1998; Chauvet 2012, On a characterization of ordered pivotal sampling). Words
    lie end to end on a line, each as long as its inclusion probability, no longer than one. The line is cut into K
    strata of length one, and every stratum draws the word at a random point of it. A word ``w`` on the border of two
    strata, with ``a`` of it in the first and ``b`` in the second, must not be drawn by both: where the first has drawn
    it, the second draws from what is right of ``w``; where it has not, the second draws ``w`` with probability
    ``b / (1 - a)``. Then ``w`` is drawn with probability ``a + (1 - a) b / (1 - a) = a + b``, and what is right of it,
    ``(a + (1 - a) (1 - b / (1 - a))) / (1 - b) = 1`` times as often as without the rule.

    Words of one stratum never meet. So the line is a circle, whose strata begin at the edge of a random word. Whether a
    stratum draws the word on its right border may depend on whether its neighbour to the left has. If it does, it
    repeats the neighbour, since at one and the same random number the rule only ever moves a draw to the right. What it
    repeats is thus what the latest stratum did for which it made no difference: no loop. O(K log V), from running sums.

    Args:
        reached_V: running sum of ``inclusion_mass``.
        shape: of the ids; its last dimension is ``count``.
        generator: of the draws.
    """
    *rows, count = shape
    device, circle = reached_V.device, count * DRAW

    def number(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64, device=device)

    first = torch.randint(len(reached_V), (*rows, 1), generator=generator, device=device)
    edge_K = (reached_V[first] + DRAW * torch.arange(count, device=device)) % circle
    border_K = torch.searchsorted(reached_V, edge_K, right=True)
    after_K = reached_V[border_K] - edge_K
    before_K = edge_K - torch.where(border_K > 0, reached_V[border_K - 1], 0)
    after_K = torch.where(before_K > 0, after_K, 0)  # a word that begins at the edge is on no border

    # Where the stratum draws, if its neighbour to the left has drawn the word on their border, and if it has not.
    random_K, rest_K = number(*shape), DRAW - after_K
    chance_K = after_K.double() / (DRAW - before_K)
    scaled_K = (random_K - chance_K).clamp(min=0) / (1 - chance_K).clamp(min=2.0**-53)
    drawn_K, open_K = ((after_K + (r * rest_K).long()).clamp(max=DRAW - 1) for r in (random_K, scaled_K))
    open_K = torch.where(random_K < chance_K, 0, open_K)

    right_K = DRAW - torch.cat([before_K[..., 1:], torch.zeros_like(first)], -1)
    if_drawn_K, if_open_K = drawn_K >= right_K, open_K >= right_K
    place_K = torch.arange(count, device=device).expand(*rows, count)
    latest_K = torch.where(if_drawn_K == if_open_K, place_K, -1).cummax(-1).values
    state_K = (latest_K >= 0) & if_open_K.gather(-1, latest_K.clamp(min=0))
    state_K = torch.cat([torch.zeros_like(state_K[..., :1]), state_K[..., :-1]], -1)
    return torch.searchsorted(reached_V, (edge_K + torch.where(state_K, drawn_K, open_K)) % circle, right=True)


def fill_up(member_V: Tensor, ids_K: Tensor) -> Tensor:
    """Return the ids of the members, and of the first other ones among ``ids`` as many as bring them to K, in order.

    Args:
        member_V: which words are members.
        ids_K: different words, in the order of preference.
    """
    inside_K = member_V[ids_K]
    taken_K = (~inside_K).cumsum(0) <= len(ids_K) - member_V.sum()
    return member_V.index_put((ids_K,), inside_K | taken_K).nonzero().squeeze(1)


def log_inclusion_probability(mass_V: Tensor, ids: Tensor) -> Tensor:
    """Return the log probability that each of ``ids`` is among the distinct draws of these masses."""
    return (mass_V[ids].float() / DRAW).log()


def _apportion(share_V: Tensor, units: int, most: int) -> Tensor:
    """Split ``units`` in proportion to ``share`` into integers between one and ``most`` that sum to it exactly."""
    unit_V = (share_V * (units / share_V.sum())).round().long().clamp(1, most)
    while surplus := int(unit_V.sum()) - units:
        # Rounding left a few too many or too few: spread them evenly, the least probable words first.
        room_V = unit_V - 1 if surplus > 0 else most - unit_V
        each = -(-abs(surplus) // int((room_V > 0).sum()))
        room_V = room_V.clamp(max=each)
        taken_V = room_V.flip(0).cumsum(0).flip(0) - room_V
        change_V = torch.minimum((abs(surplus) - taken_V).clamp(min=0), room_V)
        unit_V = unit_V - change_V if surplus > 0 else unit_V + change_V
    return unit_V
