"""What every test gets, and may ask for."""

import os

import jaxtyping
import pytest
import torch

if not torch.cuda.is_available():  # Triton asks for this when it is imported, which the package leaves until later
    os.environ.setdefault("TRITON_INTERPRET", "1")

from lvsoftmax.ops.backends import interprets_triton  # noqa: E402
from lvsoftmax.ops.linear_cross_entropy import BACKENDS  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread_and_a_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(params=list(BACKENDS.obstacles))
def backend(request):
    """Every backend of the linear cross-entropy that can run here, tensors being made on its device.

    Triton's interpreter runs on the CPU.
    """
    kind = "cuda" if request.param == "triton" and not interprets_triton() else "cpu"
    reason = BACKENDS.obstacles[request.param](torch.device(kind))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with torch.device(kind):
        yield request.param


@pytest.fixture
def without_type_checks():
    """Annotations checked by nobody, as for users: for compilers to trace, and for wrong values to reach the code."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def in_double():
    """Tensors made without a type are float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
