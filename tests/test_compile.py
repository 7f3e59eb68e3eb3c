"""``torch.compile`` traces every layer whole, the draws being given, and changes nothing."""

import jaxtyping
import pytest
import torch
from cases import CASES, Batch, assert_close, dense, for_every_case, gradients, randomise

# dynamo instantiates autograd functions itself while it traces them
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def no_shape_checks_and_a_fresh_compiler():
    """Shape checks read the tensors' sizes in ways that a tracer cannot follow; users do not have them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    torch.compiler.reset()
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def assert_compiled_equals_eager(case, backend):
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
