"""Softmax within groups of words: of the targets' groups, or of all."""

from lvsoftmax.ops.grouped_nll.reference import grouped_log_softmax, grouped_nll

__all__ = ["grouped_log_softmax", "grouped_nll"]
