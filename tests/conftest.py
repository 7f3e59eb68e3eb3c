"""What every test gets, and may ask for."""

import jaxtyping
import pytest
import torch


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
