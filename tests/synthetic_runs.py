"""Run folders as training leaves them, with invented numbers, and the comparison and the report of such folders."""

import json
import math
from pathlib import Path
from typing import Any

import yaml

from experiments import report
from experiments.comparison import survey
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
    processor: str = "A processor",
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
        "processor": processor,
        "device": "cpu",
        "threads": 2,
        "identity": digits * 8,
        "wandb_id": f"{layer}-{seed}-{digits}",
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


def change_result(folder, change):
    """Let ``change`` change what a run's ``result.json`` holds."""
    result = json.loads((folder / "result.json").read_text())
    change(result)
    (folder / "result.json").write_text(json.dumps(result))


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


GROWTH = {"full_softmax": (1.0, 1.0), "hierarchical_softmax": (0.05, 0.1), "adaptive_softmax": (0.2, 0.5),
          "sampled_softmax": (0.15, 0.6), "class_softmax": (0.1, 0.5),
          "differentiated_softmax": (0.4, 0.95)}  # fmt: skip
"""Seconds of a step at V = 10,000, and the power of V by which they grow, of a benchmark that never ran."""


def make_benchmark(path: Path, vocabs: tuple[int, ...] = (1000, 10_000, 100_000, 1_000_000)) -> Path:
    """Write what ``experiments.benchmark study=vocabulary`` leaves: exact powers of V at N 1,024 and D 256."""
    header = ("contestant,kind,tokens,hidden,vocab,precision,device,threads,optim,status,reason,parameters,flops,clock,"
              "train_rounds,train_seconds,train_over_full_softmax,gradient_bytes,extra_bytes")  # fmt: skip
    lines = [header]
    for vocab in vocabs:
        lines.append(f"copy,limit,1024,256,{vocab},fp32,cpu,1,adagrad,timed,,,,CPU time,3,0.001,,,")
        lines.append(f"peer,peer,1024,256,{vocab},fp32,cpu,1,adagrad,timed,,{vocab * 257},,CPU time,3,9,,1,1")
        lines.append(f"broken_softmax,layer,1024,256,{vocab},fp32,cpu,1,adagrad,not timed,why,,,CPU time,,,,,")
        for name, (seconds, power) in GROWTH.items():
            took, full = seconds * (vocab / 10_000) ** power, vocab / 10_000
            numbers = f"{vocab * 257},{took * 1e12},CPU time,3,{took!r},{took / full!r},{vocab * 1028},{vocab * 100}"
            lines.append(f"{name},layer,1024,256,{vocab},fp32,cpu,1,adagrad,timed,,{numbers}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    environment = {"processor": "A processor", "revision": "5d221a0" + 33 * "0", "versions": {"torch": "2.13.0"}}
    (path.parent / "environment.json").write_text(json.dumps(environment))
    return path


def make_seeds(root: Path, seeds: tuple[int, ...] = (1, 2, 3)) -> list[Path]:
    """Three texts with several seeds: small at equal text, larger at equal text, large at equal time.

    The seeds move every layer's loss alike, by 0.03 and more, and each layer's own by 0.001.
    """
    budgets = {"ptb": (10_000, {"tokens": 4_000_000}), "wikitext2": (33_278, {"tokens": 4_000_000}),
               "enwiki2014": (140_000, {"seconds": 1200.0})}  # fmt: skip
    above = {
        "ptb": {"sampled_softmax": 0.01, "adaptive_softmax": 0.03, "class_softmax": 0.015,
                "hierarchical_softmax": 0.15},
        "wikitext2": {"sampled_softmax": 0.03, "adaptive_softmax": 0.0, "class_softmax": 0.04,
                      "hierarchical_softmax": 0.2},
        "enwiki2014": {"sampled_softmax": -0.15, "adaptive_softmax": -0.2, "class_softmax": -0.1,
                       "hierarchical_softmax": -0.05},
    }  # fmt: skip
    speeds = {"full_softmax": 5000, "sampled_softmax": 17_000, "adaptive_softmax": 19_000, "class_softmax": 20_000,
              "hierarchical_softmax": 24_000}  # fmt: skip
    folders = []
    for corpus, (vocabulary, limit) in budgets.items():
        for seed in seeds:
            for place, (layer, speed) in enumerate(speeds.items()):
                jitter = 0.001 * ((seed * (place + 2)) % 3 - 1)
                loss = math.log(120) + 0.03 * seed + above[corpus].get(layer, 0.0) + jitter
                tokens = int(limit.get("tokens", speed * limit.get("seconds", 0)))
                folders.append(make_run(
                    root, layer, seed=seed, corpus=corpus, vocabulary=vocabulary, perplexity=math.exp(loss),
                    speed=speed, tokens=tokens, peak_bytes=1_200_000_000 - 100_000_000 * place,
                    budget={"epochs": None, "tokens": None, "seconds": None} | limit,
                ))  # fmt: skip
    return folders


def make_sweep(root: Path) -> list[Path]:
    """Numbers of drawn words under two noise distributions, beside full softmax; one seed."""
    folders = [make_run(root, "full_softmax", corpus="zipf", perplexity=140.0)]
    for noise, factor in (("uniform", 2.0), ("unigram", 1.0)):
        for samples in (16, 64, 256):
            folders.append(make_run(
                root, "sampled_softmax", corpus="zipf", digits=f"{noise}{samples}",
                output={"noise": noise, "samples": samples}, perplexity=140 + factor * 160 / samples**0.5,
            ))  # fmt: skip
    return folders


def comparison_of(folders):
    """The one setting that the folders have."""
    (comparison,) = survey(folders, "Study").comparisons
    return comparison


def written(folders, output, **options):
    """Write a report with nothing shipped beside it, and return its one comparison."""
    found = report.write(folders, output, "Study", **{"results": output / "nothing"} | options)
    return found.comparisons[0] if len(found.comparisons) == 1 else found


def names(comparison):
    return [row.label for row in comparison.rows]
