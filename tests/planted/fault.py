"""What a fault is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A change of the package's text.

    Attributes:
        title: what is wrong with it.
        edits: file below ``lvsoftmax``, what stands there once, and what comes in its place.
        tests: files below ``tests``, and pytest's options.
    """

    title: str
    edits: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]


def fault(title: str, tests: str, *edits: tuple[str, str, str]) -> Fault:
    """Return a fault, its tests separated by spaces."""
    return Fault(title, edits, tuple(tests.split()))
