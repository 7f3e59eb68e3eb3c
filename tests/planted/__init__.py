"""Faults to plant, one file for each part of the package; `tests/faults.py` plants them."""
