"""The table of faults follows the package."""

import pytest
from faults import FAULTS, ROOT, changed


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.title)
def test_a_fault_changes_lines_that_there_are(fault):
    texts = changed(fault, ROOT)
    assert texts and all(path.read_text() != text for path, text in texts.items())
    assert all((ROOT / "tests" / name).exists() for name in fault.tests if name.endswith(".py"))
