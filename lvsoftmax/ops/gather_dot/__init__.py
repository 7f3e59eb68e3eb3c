"""Logits of words that differ from token to token."""

from lvsoftmax.ops.gather_dot.reference import gather_dot

__all__ = ["gather_dot"]
