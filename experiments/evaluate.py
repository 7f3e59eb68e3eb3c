"""Evaluate a run exactly on any text: ``python -m experiments.evaluate run=<folder> text=my.txt``.

The text must have the form that the run's had, words apart by spaces and, for the default one, in lower case with marks
apart, too: words outside the run's vocabulary count as ``<unk>``. Prints one JSON object, with their share in it. A
finished run's temperature, fitted to its own validation text, is tried on this one.
"""

from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.cli import CONFIGS, guarded, one_line_errors, resolved
from experiments.train import find_device
from lvsoftmax import strict_json
from lvsoftmax.data.batches import ContiguousBatches
from lvsoftmax.data.text import read_blocks
from lvsoftmax.data.vocabulary import Vocabulary
from lvsoftmax.evaluate import evaluate
from lvsoftmax.runs import build, load, load_config, load_vocabulary


def evaluate_run(config: dict[str, Any]) -> dict[str, Any]:
    """Return the exact figures of a run on the configured text.

    Raises:
        ValueError: the text has words outside a vocabulary that knows no ``<unk>``, the split does not exist, or there
            are two texts.
        FileNotFoundError: there is no run, or no text.
    """
    text = config["text"]
    if text and config.get("data"):
        raise ValueError(f"text={text} and data={config['name']['data']}: one text is evaluated; leave one out")
    if text and config["split"] != "test":
        raise ValueError(f"text={text} and split={config['split']}: a file has no splits; leave one out")
    model = load(config["run"]).to(find_device(config["device"]))
    vocabulary, source = load_vocabulary(config["run"]), None
    if text:
        read = "".join(read_blocks(Path(text)))
        ids = vocabulary.encode(read.removesuffix("\n").split("\n") if read else [])
    else:
        if config["split"] not in ("train", "valid", "test"):
            raise ValueError(f"split={config['split']}: choose train, valid or test")
        own = load_config(config["run"])["data"]
        corpus = build(whole(config["data"]) if config.get("data") else own)
        ids = getattr(corpus, config["split"])
        if corpus.vocabulary.words == vocabulary.words:
            source = corpus.source
        else:
            ids = translate(ids, corpus.vocabulary, vocabulary)
    batches = ContiguousBatches(ids, config["size"], config["length"], start=vocabulary.eos, complete=True)
    temperature = fitted_temperature(Path(config["run"]))
    counts = torch.from_numpy(vocabulary.counts)
    figures = evaluate(model, batches, counts=counts, source=source, temperature=temperature)
    unknown = 0.0 if vocabulary.unk is None else float(np.mean(ids == vocabulary.unk))
    return figures | {"unknown_share": unknown}


def fitted_temperature(folder: Path) -> float | None:
    """Return the temperature of a finished run; None for one that has not finished, or has none."""
    file = folder / "result.json"
    calibrated = strict_json.loads(file.read_text("utf-8"))["valid"].get("calibrated") if file.exists() else None
    return calibrated["temperature"] if calibrated else None


def whole(data: dict[str, Any]) -> dict[str, Any]:
    """Return the corpus' configuration without limits of its own on the vocabulary: the run's decides."""
    return data | {key: value for key, value in {"min_count": 1, "max_size": None}.items() if key in data}


def translate(ids: np.ndarray, own: Vocabulary, other: Vocabulary) -> np.ndarray:
    """Return ids of ``own`` as ids of ``other``, words that it lacks as its ``<unk>``."""
    table = np.array([other.ids.get(word, -1 if other.unk is None else other.unk) for word in own.words], np.int32)
    translated = table[ids]
    if (translated < 0).any():
        word = own.words[ids[translated < 0][0]]
        raise ValueError(f"the text has the word {word!r}, outside the run's vocabulary, which knows no <unk>")
    return translated


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="evaluate")
def main(config: DictConfig) -> None:
    """Compose the configuration, evaluate, print."""
    with one_line_errors():
        print(strict_json.dumps(evaluate_run(resolved(config, HydraConfig.get().runtime.choices)), indent=1))


if __name__ == "__main__":
    guarded(main, "evaluate")
