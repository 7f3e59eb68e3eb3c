"""Log-probabilities of a binary tree of logistic decisions: along the targets' paths, or of every word."""

from lvsoftmax.ops.path_nll.reference import path_nll, tree_log_prob

__all__ = ["path_nll", "tree_log_prob"]
