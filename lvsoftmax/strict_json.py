"""JSON with numbers that JSON has no form for: written as the strings that JavaScript and Protocol Buffers use.

A distribution may give a word of a text the probability zero. The text's perplexity is infinite then, a number like any
other, but Python's ``Infinity`` without quotes is no JSON: most readers refuse the whole file. In quotes it is, and
``float("Infinity")`` in Python, ``Number("Infinity")`` in JavaScript give it back, as :func:`loads` does everywhere in
a document at once.
"""

import json
import math
from typing import Any

_NUMBERS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Return ``value`` as JSON."""
    return json.dumps(_named(value), indent=indent, allow_nan=False)


def loads(text: str) -> Any:
    """Return what ``dumps`` was given; numbers that Python wrote without quotes are understood, too."""
    return _numbered(json.loads(text))


def _named(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _named(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_named(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _numbered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbered(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_numbered(part) for part in value]
    return _NUMBERS.get(value, value) if isinstance(value, str) else value
