"""What the page's question "which layer should I use?" is answered from: measured tables, as its script takes them.

Imports no torch.
"""

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from experiments.comparison import REFERENCE, Comparison
from experiments.reading import Run
from experiments.scaling import Growth, Point, Scaling

ROOT = Path(__file__).parent.parent


@cache
def is_exact(name: str) -> bool | None:
    """Return whether a layer is trained on its likelihood and gives every word a probability; None of an unknown one.

    Both are visible in its source, and reading that spares the page an import of torch: a layer that defines no
    ``forward`` is trained on its likelihood. Whether a probability takes a pass over the vocabulary, neither says.
    """
    file = ROOT / "lvsoftmax" / "layers" / f"{name}.py"
    if not file.is_file():
        return None
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name.lower() == name.replace("_", ""):
            return not any(
                (isinstance(part, ast.FunctionDef) and part.name == "forward")
                or (isinstance(part, ast.Assign) and ast.unparse(part) == "full_support = False")
                for part in node.body
            )
    return None


def advice(comparisons: Sequence[tuple[str, Comparison]], scaling: Scaling | None) -> dict[str, Any]:
    """Return the evidence as plain values.

    What a layer costs on generated text, whose source many of them can represent, says nothing of real text: it is
    evidence only where there is no other.

    Args:
        comparisons: settings, and where on the page each is shown.
        scaling: step times over the vocabulary.
    """
    compared = [(place, one) for place, one in comparisons if one.reference and len(one.finished) > 1]
    real = [(place, one) for place, one in compared if not one.generated]
    growths = scaling.growths if scaling else []
    full = {point.vocab: point.seconds for one in growths if one.contestant == REFERENCE for point in one.points}
    return {
        "scaling": scaling and {
            "tokens": scaling.tokens,
            "hidden": scaling.hidden,
            "layers": [_curve(growth, full) for growth in growths],
        },
        "settings": [_quality(place, comparison) for place, comparison in real or compared],
    }  # fmt: skip


def _curve(growth: Growth, full: Mapping[int, float]) -> dict[str, Any]:
    """Return what a layer takes by size of vocabulary.

    Layers are raced in groups, at different moments: where a ratio to full softmax in the same rounds
    is known, a time is that ratio times full softmax's.
    """

    def seconds(point: Point) -> float:
        return point.over_full * full[point.vocab] if point.over_full and point.vocab in full else point.seconds

    return {
        "name": growth.name,
        "label": growth.label,
        "options": growth.options,
        "exact": bool(is_exact(growth.name)),
        "points": [[point.vocab, seconds(point), point.memory] for point in growth.points],
    }


def _quality(place: str, comparison: Comparison) -> dict[str, Any]:
    rows = []
    for row in comparison.finished:
        gap, speed_up = row.cells["difference"], row.cells["speed_up"]
        rows.append({
            "name": row.runs[0].layer,
            "label": row.label,
            "options": own_options(row.finished[0]),
            "exact": bool(is_exact(row.runs[0].layer)),
            "reference": row is comparison.reference,
            "above": gap.mean if gap and math.isfinite(gap.mean) else None,
            "verdict": row.verdict,
            "speedUp": speed_up.mean if speed_up else None,
            "seeds": len(row.finished),
            "note": row.note,
        })  # fmt: skip
    return {
        "title": str(comparison.setting),
        "place": place,
        "vocab": comparison.vocabulary,
        "inTime": comparison.setting.in_time,
        "rows": rows,
    }


def own_options(run: Run) -> dict[str, str]:
    """Return the options in which a run's output layer differs from its yaml, what decides only speed left out."""
    defaults = _defaults(run.layer)
    own = {key: value for key, value in run.config["output"].items() if key not in ("_target_", "backend", "sparse")}
    return {key: _written(value) for key, value in own.items() if key not in defaults or defaults[key] != value}


@cache
def _defaults(name: str) -> dict[str, Any]:
    file = ROOT / "configs" / "output" / f"{name}.yaml"
    content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {key: value for key, value in content.items() if not re.match(r"\$\{", str(value))}


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def script(values: Any) -> str:
    """Return values as JSON that cannot end the script element around it."""
    return json.dumps(values, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
