"""The mirror of a run in wandb: what is logged, what is not imported, where files go."""

import json
import os
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest
from small_runs import ENVIRONMENT, command, metrics
from wandb.proto import wandb_internal_pb2

from experiments.tracking import Tracker


def wandb_records(file):
    """Yield the records of an offline run's file, a log in LevelDB's format after a header of seven bytes."""
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # the end of a block that is too short for a record's header is padding
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            yield record
            parts = []


@pytest.mark.parametrize("layer", ["full_softmax", "sparsemax_output"])
def test_wandb_holds_the_named_metrics(overrides, tmp_path, layer):
    """Read the offline run's own file back: what wandb would show is what the run logged, infinities included."""
    words = [*overrides, f"output={layer}", "wandb.mode=offline", f"run.dir={tmp_path}/run", "budget.epochs=1"]
    (tmp_path / "home").mkdir()
    environment = {key: value for key, value in ENVIRONMENT.items() if not key.startswith("WANDB")}
    subprocess.run(command(words), env=environment | {"HOME": str(tmp_path / "home")}, check=True)
    files = list((tmp_path / "run").rglob("*.wandb"))
    assert len(files) == 1
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert files[0].stem == f"run-{environment['wandb_id']}"
    logged: dict[str, list] = {}
    for record in wandb_records(files[0]):
        for item in record.history.item:
            logged.setdefault("/".join(item.nested_key) or item.key, []).append(json.loads(item.value_json))
    lines = metrics(tmp_path / "run")
    assert logged["train/loss"] == [line["loss"] for line in lines if line["kind"] == "train"]
    assert logged["valid/perplexity"] == [line["perplexity"] for line in lines if line["kind"] == "valid"]
    assert logged["valid/epsilon_perplexity"] == [
        line["epsilon_perplexity"] for line in lines if line["kind"] == "valid"
    ]
    assert any(name.startswith("valid/band/") for name in logged)
    for name in ("tokens_per_second", "output_share", "peak_bytes", "learning_rate", "gradient_norm"):
        assert len(logged[f"train/{name}"]) == len(logged["train/loss"])
    left = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert all(path.parent == tmp_path / "home" / ".cache" / "lvsoftmax" for path in left)  # compiled operations


def test_disabled_wandb_is_not_imported_and_a_failing_one_does_not_end_the_run(overrides, tmp_path):
    check = "import atexit, sys\natexit.register(lambda: print('wandb' in sys.modules))"
    words = [*overrides, f"run.dir={tmp_path}/disabled", "budget.epochs=1"]
    done = subprocess.run(command(words, check), env=ENVIRONMENT, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    broken = "import sys, types\nbroken = sys.modules['wandb'] = types.ModuleType('wandb')\n"
    words = [*overrides, f"run.dir={tmp_path}/broken", "budget.epochs=1", "wandb.mode=offline"]
    done = subprocess.run(command(words, broken), env=ENVIRONMENT, check=True, capture_output=True, text=True)
    assert done.stderr.count("wandb failed") == 1
    assert (tmp_path / "broken" / "result.json").exists()


@pytest.mark.parametrize(("mode", "own"), [("offline", True), ("online", False)])
def test_online_the_user_s_own_settings_say_where(mode, own, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: None, Settings=SimpleNamespace))
    for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", "mine")
    Tracker(tmp_path, {"wandb": {"mode": mode, "project": "p", "group": None}}, "id")
    assert (os.environ["WANDB_CONFIG_DIR"] == str(tmp_path)) == own
    assert os.environ["WANDB_CACHE_DIR"] == str(tmp_path)
