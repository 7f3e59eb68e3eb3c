"""A mixture of softmaxes over one table: of the targets, weighted and summed, or of all words."""

from lvsoftmax.ops.mixture_nll.reference import mixture_log_prob, mixture_nll, mixture_nll_loss

__all__ = ["mixture_log_prob", "mixture_nll", "mixture_nll_loss"]
