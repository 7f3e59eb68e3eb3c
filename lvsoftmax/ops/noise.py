"""Noise distributions over words: draw ids on the device, know their expected counts."""

from typing import NamedTuple

from torch import Tensor


class Sample(NamedTuple):
    """Words drawn from a noise distribution, with what a correction needs to know about them.

    ``log_expected`` is the logarithm of how often a word is expected among the draws: ``log(K q)`` with replacement,
    the log inclusion probability without.
    """

    ids: Tensor  # [K] shared by all tokens
    log_expected: Tensor  # [K] of the drawn words
    target_log_expected: Tensor  # [tokens] of the targets
