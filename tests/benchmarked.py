"""The benchmark's program, run as from the command line, and a problem that takes no time."""

import csv
import sys

from experiments import benchmark
from experiments.bench.cell import Cell
from experiments.cli import guarded

CELL = Cell(tokens=8, hidden=16, vocab=200)
TINY = ("study.tokens=[8]", "study.hidden=[16]", "study.vocab=[200]", "rounds=1", "device=cpu", "progress=false")


def program(monkeypatch, capsys, tmp_path, *words):
    """Run the program with a command line; return its exit status, output and errors."""
    monkeypatch.setattr(sys, "argv", ["benchmark", f"run.root={tmp_path}", *words])
    status = 0
    try:
        guarded(benchmark.main, "benchmark", benchmark.BENCHMARK)
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def rows(folder):
    return {line["contestant"]: line for line in csv.DictReader((folder / "results.csv").read_text().splitlines())}
