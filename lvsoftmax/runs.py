"""A run's folder: what was asked, where it ran, what came out, and enough to go on after a kill.

``config.yaml`` (resolved), ``environment.json``, ``vocabulary.tsv``, ``metrics.jsonl``, ``checkpoints/last.pt`` and,
last of all, ``result.json``: its existence means done. What the output layer was given of the training text, of files
or of other runs is in ``statistics/``, and what it chose for the machine in ``config.yaml``, so that the model can be
built again without them.
"""

import hashlib
import importlib
import inspect
import io
import json
import os
import platform
import secrets
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

from lvsoftmax import strict_json
from lvsoftmax.data.corpus import Corpus
from lvsoftmax.data.statistics import STATISTICS
from lvsoftmax.data.vocabulary import Vocabulary
from lvsoftmax.models.language_model import LanguageModel

DECISIVE = ("output", "model", "optim", "schedule", "seed", "precision", "batch", "evaluate")
"""Fields that decide a run's numbers, beside its corpus (and its budget where the schedule follows it)."""

BY_ITSELF = "auto"
"""What a field of the output layer says to be chosen by the layer, for the machine: a run keeps what it began with."""

FROM_TEXT = "text"
"""What a field of the output layer says to be given the statistic of the training text that has the field's name."""


def build(config: Mapping[str, Any], *args: Any, **extra: Any) -> Any:
    """Call what ``config['_target_']`` names with the remaining fields; mappings with a target are built first.

    Raises:
        ValueError: the target does not exist, or does not take one of the fields.
    """
    fields = {
        key: build(value) if isinstance(value, Mapping) and "_target_" in value else value
        for key, value in config.items()
        if key != "_target_"
    }
    module, _, name = config["_target_"].rpartition(".")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"_target_={config['_target_']}: {error}") from error
    try:
        inspect.signature(target).bind(*args, **fields, **extra)
    except TypeError as error:
        raise ValueError(f"{config['_target_']}: {error}") from error
    return target(*args, **fields, **extra)


def folder_for(config: Mapping[str, Any], corpus_digest: str, *, follows_budget: bool) -> Path:
    """Return the folder of a run: the same configuration on the same text always finds the same one.

    The name's digits hash the fields that decide numbers and the encoded corpus, not paths, logging or device. The
    budget counts only where the schedule follows it; elsewhere a larger budget continues the run.
    """
    if config["run"]["dir"]:
        return Path(config["run"]["dir"])
    digits = identity(config, corpus_digest, follows_budget=follows_budget)[:8]
    layer, model = config["name"]["output"], config["name"]["model"]
    return Path(config["run"]["root"]) / config["name"]["data"] / f"{layer}-{model}-seed{config['seed']}-{digits}"


def identity(config: Mapping[str, Any], corpus_digest: str, *, follows_budget: bool) -> str:
    """Return the hash of everything that decides a run's numbers: files and other runs, wherever they lie, included.

    Raises:
        ValueError: a file that the output layer asks for cannot be read.
    """
    decisive = {key: config[key] for key in DECISIVE} | {"corpus": corpus_digest}
    decisive["output"] = {key: value for key, value in config["output"].items() if key != "backend"}
    for name, folder in runs_asked(config).items():
        decisive["output"][name] = _identity_in(folder)
    for name, file in files_asked(config).items():
        decisive["output"][name] = _digest(name, file)
    # A field that is younger than many a run counts only where it is set, so that those runs are found again.
    unset = {"final_tokens": None}.items()
    decisive["evaluate"] = {key: value for key, value in config["evaluate"].items() if (key, value) not in unset}
    if follows_budget:
        decisive["budget"] = config["budget"]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


LOCK = "lock"
"""File of a run's folder that the process which trains it holds."""


class RunFolder:
    """Reads and writes one run's folder; every file but ``metrics.jsonl`` appears whole or not at all.

    Args:
        path: the folder; made when the run first writes.
        identity: what :func:`identity` returned for this run.

    Raises:
        ValueError: the folder holds a run of another configuration, or something that is no run.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.identity = identity
        self._held: int | None = None
        if any(file.is_file() and file.suffix != ".part" and file.name != LOCK for file in path.rglob("*")):
            try:
                found = _identity_in(path)
            except (OSError, ValueError, KeyError) as error:
                raise ValueError(f"run.dir={path} is not empty and holds no run; choose another folder") from error
            if found != identity:
                raise ValueError(f"run.dir={path} holds a run of another configuration; choose another folder")

    @property
    def result(self) -> dict[str, Any] | None:
        """The result of a finished run, else None."""
        file = self.path / "result.json"
        return strict_json.loads(file.read_text()) if file.exists() else None

    @property
    def wandb_id(self) -> str | None:
        """The run's id in wandb, None before the first start: the folder's own, as others may have its identity."""
        file = self.path / "environment.json"
        return json.loads(file.read_text("utf-8")).get("wandb_id") if file.exists() else None

    def settled(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the configuration with what its output layer chose by itself when the run began, if it has."""
        if not (self.path / "config.yaml").exists():
            return config
        begun = load_config(self.path)["output"]
        chosen = [name for name, value in config["output"].items() if value == BY_ITSELF and name != "backend"]
        return with_output(config, {name: begun[name] for name in chosen})

    def claim(self) -> None:
        """Hold the folder until this process ends, and clear what a killed one left half-written.

        Raises:
            ValueError: another process trains this run.
        """
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        self._lock()
        for leftover in self.path.rglob("*.part"):
            leftover.unlink()

    def start(
        self,
        config: Mapping[str, Any],
        vocabulary: Vocabulary,
        arrays: Mapping[str, np.ndarray],
        device: torch.device,
        backend: str = "eager",
    ) -> None:
        """Write what is known before the first step, once nothing is in its way.

        A result that is there is that of a smaller budget, and goes.

        Raises:
            ValueError: another process trains this run.
        """
        self.claim()
        environment = describe_environment(device) | {"backend": backend, "identity": self.identity}
        environment["wandb_id"] = self.wandb_id or secrets.token_hex(8)
        (self.path / "result.json").unlink(missing_ok=True)
        self._write("environment.json", json.dumps(environment, indent=1).encode())
        self._write("config.yaml", yaml.safe_dump(dict(config), sort_keys=False).encode())
        rows = zip(vocabulary.words, vocabulary.counts.tolist(), strict=True)
        self._write("vocabulary.tsv", "".join(f"{word}\t{count}\n" for word, count in rows).encode())
        for name, values in arrays.items():
            (self.path / "statistics").mkdir(exist_ok=True)
            content = io.BytesIO()
            np.save(content, values)
            self._write(f"statistics/{name}.npy", content.getbuffer())

    def log(self, **values: Any) -> None:
        """Append one line to ``metrics.jsonl``."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(strict_json.dumps(values) + "\n")

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint; it remembers how long ``metrics.jsonl`` was."""
        with (self.path / "metrics.jsonl").open("ab") as metrics:  # on the disk before the checkpoint that counts on it
            os.fsync(metrics.fileno())
            state = state | {"metrics_bytes": metrics.tell()}
        part = self.path / "checkpoints" / "last.pt.part"
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(part.with_suffix(""))

    def restore(self) -> dict[str, Any] | None:
        """Return the last checkpoint and cut ``metrics.jsonl`` back to it; None, and no metrics, without one.

        Raises:
            ValueError: the run is finished and its checkpoint is not here, as where a study took it from elsewhere.
        """
        metrics, checkpoint = self.path / "metrics.jsonl", self.path / "checkpoints" / "last.pt"
        if not checkpoint.exists():
            if self.result is not None:
                raise ValueError(
                    f"{self.path} holds a result and no checkpoint from which the run could go on; delete the folder "
                    "to begin anew, or set run.root or run.dir to another one"
                )
            metrics.unlink(missing_ok=True)
            return None
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if metrics.exists():
            os.truncate(metrics, min(state["metrics_bytes"], metrics.stat().st_size))
        return state

    def finish(self, result: dict[str, Any]) -> None:
        """Write ``result.json``: the run is done."""
        self._write("result.json", strict_json.dumps(result, indent=1).encode())

    def _lock(self) -> None:
        """Hold the folder until this process ends: two that write into it would spoil the run."""
        if fcntl is None or self._held is not None:
            return
        held = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(held)
            raise ValueError(f"{self.path} is being trained by another process; end that one or wait for it") from error
        self._held = held

    def _write(self, name: str, content: bytes | memoryview) -> None:
        part = self.path / f"{name}.part"
        part.write_bytes(content)
        part.replace(self.path / name)


def asked_of_text(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the statistics of the training text that a configuration's output layer asks for.

    Raises:
        ValueError: there is no statistic of a field's name.
    """
    names = [name for name, value in config["output"].items() if value == FROM_TEXT]
    for name in names:
        if name not in STATISTICS:
            raise ValueError(f"output.{name}={FROM_TEXT}: a text can give {' and '.join(STATISTICS)}, nothing else")
    return names


def runs_asked(config: Mapping[str, Any]) -> dict[str, Path]:
    """Return the fields of a configuration's output layer that name the folder of another run."""
    paths = {name: Path(value) for name, value in config["output"].items() if isinstance(value, str)}
    return {name: path for name, path in paths.items() if (path / "environment.json").is_file()}


def files_asked(config: Mapping[str, Any]) -> dict[str, Path]:
    """Return the fields of a configuration's output layer that name an ``.npy`` file."""
    paths = {name: Path(value) for name, value in config["output"].items() if isinstance(value, str)}
    return {name: path for name, path in paths.items() if path.suffix == ".npy"}


def given(config: Mapping[str, Any], corpus: Corpus) -> dict[str, np.ndarray]:
    """Return what a configuration's output layer asks for, by field: of a text, of files, word tables of other runs.

    Raises:
        ValueError: there is no statistic of a field's name, a file cannot be read, or a run has another vocabulary or
            no row per word.
    """
    found = {name: corpus.statistic(name) for name in asked_of_text(config)}
    found |= {name: _array(name, file) for name, file in files_asked(config).items()}
    return found | {name: word_table(folder, corpus.vocabulary) for name, folder in runs_asked(config).items()}


def word_table(folder: Path, vocabulary: Vocabulary) -> np.ndarray:
    """Return ``[vocab, hidden]``, the output layer's vector for each word, of a run.

    Raises:
        ValueError: the run has another vocabulary, or its layer no row per word.
    """
    if load_vocabulary(folder).words != vocabulary.words:
        raise ValueError(f"{folder} is a run over another vocabulary; name one on the same text")
    with torch.no_grad():
        return load(folder).output.embed(torch.arange(len(vocabulary))).numpy()


def build_model(
    config: Mapping[str, Any], counts: torch.Tensor, arrays: Mapping[str, np.ndarray] | None = None
) -> LanguageModel:
    """Build the language model of a configuration over a vocabulary with these counts.

    Backbone and output layer are initialised from streams of their own, so that two models which differ in the output
    layer start with the same backbone.

    Args:
        config: of the run.
        counts: ``[vocab]`` of the words, non-increasing.
        arrays: what :func:`given` returns for it.
    """
    seed = config["seed"]
    model = dict(config["model"])
    tensors = {name: torch.from_numpy(values) for name, values in (arrays or {}).items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "backbone"))
        backbone = build(model.pop("backbone"))
        torch.manual_seed(stream(seed, "output"))
        output = build({**output_config(config), **tensors}, backbone.hidden_size, counts)
        torch.manual_seed(stream(seed, "embedding"))
        return LanguageModel(backbone, output, **model)


def build_optimiser(optim: Mapping[str, Any], model: LanguageModel) -> torch.optim.Optimizer:
    """Build the optimiser of a configuration: the output layer is a group of its own where it has a rate of its own.

    Args:
        optim: of the run.
        model: whose parameters are trained.
    """
    rest = [parameter for name, parameter in model.named_parameters() if not name.startswith("output.")]
    output = list(model.output.parameters())
    rate, output_rate = optim["learning_rate"], optim["output_learning_rate"]
    groups = [{"params": rest, "lr": rate}, {"params": output, "lr": output_rate}]
    if output_rate is None:
        groups = [{"params": [*rest, *output], "lr": rate}]
    return build(optim["method"], [group for group in groups if group["params"]], lr=rate)


def output_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the output layer, with the run's ``backend`` unless that is ``auto``.

    Raises:
        ValueError: the run asks for a backend, not the reference that every layer has, and the layer has no choice.
    """
    output, backend = dict(config["output"]), config["backend"]
    if backend == "auto":
        return output
    if "backend" in output:
        return output | {"backend": backend}
    if backend == "eager":
        return output
    raise ValueError(f"backend={backend}: {output['_target_']} has no choice of backends; leave backend=auto")


def stream(seed: int, name: str) -> int:
    """Return the seed of the random stream ``name``: independent streams for each use of one user-given seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


def with_output(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with other values of some fields of its output layer."""
    return {**config, "output": {**config["output"], **fields}}


def load(folder: str | Path) -> LanguageModel:
    """Return the model of a run, as its last checkpoint left it, on the CPU and in evaluation mode.

    Raises:
        FileNotFoundError: ``folder`` holds no run with a checkpoint.
    """
    folder = Path(folder)
    checkpoint = folder / "checkpoints" / "last.pt"
    if not checkpoint.exists():
        raise FileNotFoundError(f"{folder} holds no run with a checkpoint (checkpoints/last.pt)")
    config = anywhere(load_config(folder))
    arrays = {file.stem: np.load(file) for file in (folder / "statistics").glob("*.npy")}
    model = build_model(config, torch.from_numpy(load_vocabulary(folder).counts), arrays)
    model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["model"])
    return model.eval()


def anywhere(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without the backend it was trained with, which the machine at hand may lack."""
    return with_output(config, {"backend": "auto"} if "backend" in config["output"] else {}) | {"backend": "auto"}


def _identity_in(folder: Path) -> str:
    return json.loads((folder / "environment.json").read_text("utf-8"))["identity"]


def _digest(name: str, file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise _unreadable(name, file) from error


def _array(name: str, file: Path) -> np.ndarray:
    try:
        return torch.from_numpy(np.load(file)).numpy()  # what is no array of numbers fails here
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise _unreadable(name, file) from error


def _unreadable(name: str, file: Path) -> ValueError:
    return ValueError(f"output.{name}={file}: cannot be read; give the path of an .npy file")


def load_config(folder: str | Path) -> dict[str, Any]:
    """Return the resolved configuration of a run."""
    return yaml.safe_load((Path(folder) / "config.yaml").read_text("utf-8"))


def load_vocabulary(folder: str | Path) -> Vocabulary:
    """Return the vocabulary of a run."""
    rows = [line.rsplit("\t", 1) for line in (Path(folder) / "vocabulary.tsv").read_text("utf-8").split("\n")[:-1]]
    return Vocabulary([word for word, _ in rows], np.array([int(count) for _, count in rows], np.int64))


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return where a run happens: code revision, versions, machine."""
    versions = {name: version(name) for name in ("torch", "numpy", "hydra-core", "wandb")}
    return {
        "revision": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "versions": versions,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }


def version(package: str) -> str | None:
    """Return the version of an installed package, None for one that is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    """Return what git says about the code; None where there is no git, or no repository."""
    try:
        answer = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def processor_name(cpuinfo: str) -> str:
    """Name the first processor of ``/proc/cpuinfo``, with family and model: virtual machines hide what it is called."""
    fields = [[part.strip() for part in line.split(":", 1)] for line in cpuinfo.splitlines() if ":" in line]
    first = dict(reversed(fields))
    if "model name" not in first:
        return platform.processor()
    numbers = [f"{name.removeprefix('cpu ')} {first[name]}" for name in ("cpu family", "model") if name in first]
    return ", ".join([first["model name"], *numbers])


def _processor() -> str:
    try:
        return processor_name(Path("/proc/cpuinfo").read_text("utf-8"))
    except OSError:
        return platform.processor()
