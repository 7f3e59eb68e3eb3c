"""Backbones and the language model that joins one to an output layer."""
