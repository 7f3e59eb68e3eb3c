"""``torch.compile`` traces every layer whole, the draws being given, and changes nothing."""

import shutil

import pytest
import torch
from cases import CASES, Batch, assert_close, dense, for_every_case, gradients, randomise

pytestmark = [
    pytest.mark.usefixtures("without_type_checks"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the compiler's own habits
]

YAMLS = [case for case in CASES if not case.option]
FIVE = YAMLS[:: -(-len(YAMLS) // 5)]  # at most five, spread over the folder


def assert_compiled_equals_eager(case, backend):
    torch.compiler.reset()
    layer = randomise(case.build(**dense(case)))
    batch = Batch.of(layer, dtype=torch.float32)
    sample = batch.draw(layer)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    actual = compiled(batch.hidden, batch.target, batch.previous, sample)
    expected = layer(batch.hidden, batch.target, batch.previous, sample)
    assert_close(actual, expected, 1e-5)
    assert_close(
        gradients(actual, batch.upstream, layer, batch.hidden),
        gradients(expected, batch.upstream, layer, batch.hidden),
        1e-5,
    )


@for_every_case
def test_a_traced_layer_equals_the_eager_one(case):
    assert_compiled_equals_eager(case, "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("case", FIVE, ids=str)
def test_a_layer_compiled_by_inductor_equals_the_eager_one(case):
    assert_compiled_equals_eager(case, "inductor")
