"""What every test gets, and may ask for."""

import os

import jaxtyping
import pytest
import torch

if not torch.cuda.is_available():  # Triton asks for this when a kernel is defined, which is later
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def one_thread_and_a_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def without_type_checks():
    """Annotations checked by nobody, as for users: for compilers to trace, and for wrong values to reach the code."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
