"""Faults to plant in the package, each of which some test must notice: `python tests/faults.py [words of a title]`.

Every fault is put into a private copy of the repository, alone, and the tests named beside it are run there until the
first one fails. What is printed is a table: the fault, and the test that noticed it. The status is 1 if one went
unnoticed. `tests/test_faults.py` keeps the faults from outliving the lines that they change.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from planted import kernels, layers, ops, training
from planted.fault import Fault

ROOT = Path(__file__).parents[1]
FAULTS = [*layers.FAULTS, *ops.FAULTS, *kernels.FAULTS, *training.FAULTS]


def changed(fault: Fault, root: Path) -> dict[Path, str]:
    """Return the new text of the files that a fault changes.

    Raises:
        ValueError: what it changes does not stand in its file exactly once.
    """
    texts: dict[Path, str] = {}
    for name, old, new in fault.edits:
        path = root / "lvsoftmax" / name
        text = texts.get(path) or path.read_text()
        if text.count(old) != 1:
            raise ValueError(f"{fault.title}: {name} has {text.count(old)} times: {old}")
        texts[path] = text.replace(old, new)
    return texts


def noticed_by(fault: Fault) -> str | None:
    """Return the first test that fails under a fault, None if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignore = shutil.ignore_patterns(".*", "outputs", "results", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignore)
        for path, text in changed(fault, copy).items():
            path.write_text(text)
        options = ("-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--no-header", "--tb=no")
        names = [f"tests/{name}" if name.endswith(".py") else name for name in fault.tests]
        command = [sys.executable, "-m", "pytest", *options, *names]
        run = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    failed = [
        line.split(" - ")[0].split("::")[-1] for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))
    ]
    if not failed and run.returncode < 0:  # nothing is left to say which test it was
        return f"signal {-run.returncode}"
    if run.returncode > 1:
        raise RuntimeError(f"{fault.title}: pytest returned {run.returncode}:\n{run.stdout}{run.stderr}")
    return failed[0] if failed else None


def main(words: list[str]) -> int:
    """Print the table; return the number of faults that went unnoticed, at most 1."""
    print("| fault | noticed by |\n| --- | --- |")
    unnoticed = 0
    for fault in FAULTS:
        if all(word in fault.title for word in words):
            test = noticed_by(fault)
            unnoticed += test is None
            print(f"| {fault.title} | {f'`{test}`' if test else '**nothing**'} |", flush=True)
    return min(unnoticed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
