"""Draws from distributions that every token has for itself.

Letters: N tokens, V words, L blocks of words, B words of a block, K draws of a token; P draws from R rows of masses of
C columns each.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LEAST = 2.0**-44  # share that every word keeps, however low its bias
FEWEST = 64  # words of a block: below, finding the block costs more than its words


class Drawn(NamedTuple):
    """Words drawn, and how probable they and the targets were."""

    ids: Tensor  # [N, K]
    log_probability: Tensor  # [N, K]
    target_log_probability: Tensor  # [N]


def uniform(shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
    """Return random numbers in [0, 1), float64."""
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=device)


def choose_columns(mass_RC: Tensor, row_P: Tensor, uniform_P: Tensor) -> Tensor:
    """Choose one column for each of ``row`` by a random number, in proportion to the masses of that row; O(log C) each.

    The running sums of all rows lie on one line, row ``r`` from ``r`` to ``r + 1``, in float64: a probability is
    right to ``2^-52 R``.
    """
    reached_RC = mass_RC.double().cumsum(1)
    reached_RC /= reached_RC[:, -1:].clone()
    reached_RC += torch.arange(len(mass_RC), device=mass_RC.device)[:, None]
    columns = mass_RC.shape[1]
    found_P = torch.searchsorted(reached_RC.flatten(), row_P + uniform_P, right=True)
    return (found_P - row_P * columns).clamp_(0, columns - 1)


def draw_by_blocks(
    block_mass_NL: Tensor,
    word_mass: Callable[[Tensor, slice], Tensor],
    vocab_size: int,
    block_size: int,
    target_N: Tensor,
    count: int,
    generator: torch.Generator,
) -> Drawn:
    """Draw a block by its mass, then a word of it by its own: no word of a block that is not drawn is looked at.

    The words of a block need not sum to its mass. Where they do, a word's probability is its share of the sum of all
    masses.

    Args:
        block_mass_NL: mass of every block, for every token.
        word_mass: returns the masses ``[R, B]`` of the words of a slice, for R tokens given by their numbers.
        vocab_size: V.
        block_size: words of a block; the last one may have fewer.
        target_N: words whose probability is wanted, too.
        count: K.
        generator: of the draws.
    """
    tokens, blocks = block_mass_NL.shape
    device = target_N.device
    token_N1 = torch.arange(tokens, device=device)[:, None]
    token_NK = token_N1.expand(tokens, count)
    random_NK = uniform((tokens * count,), generator, device)
    drawn_NK = choose_columns(block_mass_NL, token_NK.reshape(-1), random_NK).view(tokens, count)
    # The targets are one more column, whose words are known.
    block_NC = torch.cat([target_N[:, None] // block_size, drawn_NK], 1)
    given_NC = torch.cat([target_N[:, None] % block_size, torch.full_like(drawn_NK, -1)], 1)

    # Pairs of block and token, each once, by block; several draws may look at one pair.
    pair_P, order_P = (block_NC * tokens + token_N1).flatten().sort()
    pair_R, row_P = torch.unique_consecutive(pair_P, return_inverse=True)
    edge = torch.arange(blocks + 1, device=device) * tokens
    edges = torch.stack([torch.searchsorted(pair_R, edge), torch.searchsorted(pair_P, edge)]).tolist()
    token_R, given_P = pair_R % max(tokens, 1), given_NC.flatten()[order_P]
    random_P = uniform(given_P.shape, generator, device)
    word_P, share_P = torch.empty_like(given_P), torch.empty_like(given_P, dtype=block_mass_NL.dtype)
    for block, (first, last, start, end) in enumerate(
        zip(edges[0], edges[0][1:], edges[1], edges[1][1:], strict=False)
    ):
        if start == end:
            continue
        word = block * block_size
        mass_RB = word_mass(token_R[first:last], slice(word, min(word + block_size, vocab_size)))
        row, given = row_P[start:end] - first, given_P[start:end]
        column = torch.where(given < 0, choose_columns(mass_RB, row, random_P[start:end]), given)
        word_P[start:end] = word + column
        share_P[start:end] = mass_RB[row, column] / mass_RB.sum(1)[row]
    ids_NC = torch.empty_like(word_P).scatter_(0, order_P, word_P).view(block_NC.shape)
    log_NC = torch.empty_like(share_P).scatter_(0, order_P, share_P.log_()).view(block_NC.shape)
    log_NC += (block_mass_NL / block_mass_NL.sum(1, keepdim=True)).log().gather(1, block_NC)
    return Drawn(ids_NC[:, 1:], log_NC[:, 1:], log_NC[:, 0])


def block_sums(value_V: Tensor, block_size: int) -> Tensor:
    """Return the sum over each block of words, ``[L, ...]``."""
    blocks = -(-len(value_V) // block_size)
    padded = value_V.new_zeros(blocks * block_size, *value_V.shape[1:])
    padded[: len(value_V)] = value_V
    return padded.unflatten(0, (blocks, block_size)).sum(1)


def prior(bias_V: Tensor | None, vocab_size: int, like: Tensor) -> Tensor:
    """Return ``exp(bias) / sum exp(bias)``, uniform without a bias; at least ``LEAST``."""
    if bias_V is None:
        return like.new_full((vocab_size,), 1 / vocab_size)
    return torch.softmax(bias_V.to(like.dtype), 0).clamp(min=LEAST)
