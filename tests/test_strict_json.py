import json
import math

import pytest

from lvsoftmax.strict_json import dumps, loads

VALUES = {
    "nll": math.inf,
    "low": -math.inf,
    "bands": [{"nll": math.inf, "tokens": 3}, 1.5, None, "word"],
    "pair": [1, 2],
}


def refuse(name):
    raise AssertionError(f"{name} is no JSON")


def test_what_goes_in_comes_out():
    assert loads(dumps(VALUES)) == loads(dumps(VALUES, indent=1)) == VALUES
    assert math.isnan(loads(dumps([math.nan]))[0])
    assert dumps((1, 2.5)) == "[1, 2.5]"


def test_it_is_json_to_everybody():
    text = dumps(VALUES | {"loss": math.nan})
    found = json.loads(text, parse_constant=refuse)
    assert found["nll"] == "Infinity" and found["bands"][0]["nll"] == "Infinity" and found["loss"] == "NaN"
    assert float(found["low"]) == -math.inf


def test_what_python_writes_is_understood():
    assert loads(json.dumps(VALUES)) == VALUES


def test_finite_numbers_keep_every_digit():
    assert loads(dumps([0.1 + 0.2, 1e-300, 5e300])) == [0.1 + 0.2, 1e-300, 5e300]
    with pytest.raises(TypeError):
        dumps({"tensor": object()})
