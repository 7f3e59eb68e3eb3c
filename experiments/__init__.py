"""Hydra programs over :mod:`lvsoftmax`: train, evaluate, compare, report."""
