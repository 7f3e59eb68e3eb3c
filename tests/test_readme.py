"""What the README tells people to type exists: targets, programs, settings, files."""

import importlib.util
import re
import shlex

import pytest

from experiments.benchmark import BENCHMARK
from experiments.cli import CONFIGS, check_overrides

ROOT = CONFIGS.parent
TEXT = (ROOT / "README.md").read_text("utf-8")
TARGETS = dict(re.findall(r"^([a-z-]+):.*##.*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()]
MADE = [shlex.split(line, comments=True) for line in LINES if line.startswith("make ")]
RUN = [shlex.split(line, comments=True) for line in LINES if line.startswith("python -m ")]


def run(line: list[str]) -> tuple[str, list[str]]:
    """The module that a command runs, and the settings that it gets."""
    if line[0] == "make":
        _, target, *given = line
        arguments = next((word.removeprefix("ARGS=") for word in given if word.startswith("ARGS=")), "")
        return re.findall(r"python -m (\S+)", TARGETS[target])[-1], shlex.split(arguments)
    _, _, module, *words = line
    return module, [word for word in words if word != "-m"]  # a sweep's


def test_every_target_that_is_spoken_of_can_be_made():
    spoken = {name for name in re.findall(r"`make ([a-z-]+)", TEXT)} | {words[1] for words in MADE}
    assert spoken <= TARGETS.keys() and {"compare", "test", "bench"} <= spoken


@pytest.mark.parametrize("line", [*MADE, *RUN], ids=" ".join)
def test_every_command_names_a_program_and_settings_that_exist(line):
    program, words = run(line)
    assert importlib.util.find_spec(program)
    own = {"experiments.train": "train", "experiments.compare": "compare", "experiments.evaluate": "evaluate"}
    if program in own:
        check_overrides(own[program], words)
    elif program == "experiments.benchmark":
        check_overrides("benchmark", words, BENCHMARK)


def test_every_study_is_described():
    here = {path.stem for path in (CONFIGS / "study").glob("*.yaml")} - {"smoke"}  # the one that CI runs
    table = TEXT.partition("| study | what |")[2].partition("\n\n")[0]
    assert here == set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))


def test_every_file_that_is_linked_is_there():
    links = re.findall(r"\]\(((?!http)[^)#]+)", TEXT)
    assert links and [link for link in links if not (ROOT / link).exists()] == []
