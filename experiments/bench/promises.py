"""What this project promises of its speed, race by race."""

from pathlib import Path
from typing import Any

import torch

from experiments.bench.cell import Cell
from experiments.bench.contestants import Layer, Peer, peers
from experiments.bench.goals import (
    Entrant,
    Line,
    Race,
    beyond_gradients,
    beyond_state,
    exponent,
    percentage,
    ratio,
    ratio_or_less,
    worst_memory,
    worst_ratio,
)
from experiments.bench.limits import Products
from experiments.bench.records import REFERENCE

FULL = Layer("full_softmax")
TREE = Layer("hierarchical_softmax")
CLASSES = Layer("class_softmax")
DIFFERENTIATED = Layer("differentiated_softmax")
USUAL_CUTOFFS = Layer("adaptive_softmax", (("cutoffs", (0.05, 0.5)),))
OWN_CUTOFFS = Layer("adaptive_softmax", (("cutoffs", "auto"),))
SAMPLED_1024 = Layer("sampled_softmax", (("samples", 1024),))
SAMPLED_8192 = Layer("sampled_softmax", (("samples", 8192),))


def promises(device: str, optim: str, threads: int) -> list[Race]:
    """Return the promises for a device.

    Args:
        device: where.
        optim: the optimiser of whole steps.
        threads: of the CPU.
    """
    place = {"device": device, "threads": threads}
    if torch.device(device).type == "cuda":
        return [_exact_on_cuda(place), _words_on_cuda(place), _adaptive_on_cuda(place), _tree_on_cuda(place)]
    return [
        _exact_large(place),
        _exact_small(place),
        *(_tree(place, *case) for case in (("2a", 1024, 33_278, 300), ("2b", 1024, 100_000, 600),
                                           ("2c", 4096, 267_735, 1200))),
        _tree_and_gensim("2e", 1024, place),
        _tree_and_gensim("2f", 4096, place),
        _bands_classes_samples(place),
        _whole_step(place, optim),
    ]  # fmt: skip


def _exact_large(place: dict[str, Any]) -> Race:
    cell = Cell(4096, 512, 100_000, **place)
    return Race(
        _sizes(cell),
        {"products": Entrant(Products(), cell), "exact": Entrant(FULL, cell, measured=True)},
        [
            Line("1a", "exact loss over the bare products", ratio("exact", "products"), at_most=1.05),
            Line("1b", "exact loss, memory beyond inputs and gradients", beyond_gradients("exact"), at_most=200),
            Line("7a", "exact loss over the bare products", ratio("exact", "products"), at_most=0.85, stretch=True),
        ],
    )


def _exact_small(place: dict[str, Any]) -> Race:
    cell = Cell(1024, 256, 33_278, **place)
    half = Cell(1024, 256, 33_278, precision="bf16", **place)
    return Race(
        _sizes(cell),
        {
            "products": Entrant(Products(), cell),
            "exact": Entrant(FULL, cell),
            "per token": Entrant(FULL, cell, "per_token", measured=True),
            "torch": Entrant(_peer("F.linear_cross_entropy, default options"), cell),
            "compiled": Entrant(_peer("PyTorch, compiled"), cell),
            "bf16": Entrant(FULL, half),
        },
        [
            Line("1c", "exact loss over the bare products", ratio("exact", "products"), at_most=1.2),
            Line("1d", "nll, any upstream gradient, over the products", ratio("per token", "products"), at_most=1.5),
            Line("1e", "nll, any upstream gradient, memory beyond inputs and gradients", beyond_gradients("per token"),
                 at_most=40),
            Line("1f", "exact loss, faster than F.linear_cross_entropy", ratio("torch", "exact"), at_least=4),
            Line("1g", "exact loss over torch.compile's", ratio("exact", "compiled"), at_most=1),
            Line("1h", "exact loss in bf16, its value right, over fp32", ratio("bf16", "exact"), at_most=0.6,
                 hurdle=_without_bf16()),
        ],
    )  # fmt: skip


def _tree(place: dict[str, Any], name: str, tokens: int, vocab: int, bound: float) -> Race:
    cell = Cell(tokens, 512, vocab, **place)
    lines = [
        Line(name, "Huffman tree, faster than the eager softmax", ratio_or_less("eager", "products", "tree"),
             at_least=bound)
    ]  # fmt: skip
    if name == "2b":
        faster = ratio("padded", "tree")
        lines.append(Line("2d", "Huffman tree, faster than padded gathers with dense gradients", faster, at_least=20))
    return Race(
        _sizes(cell),
        {
            "eager": Entrant(_peer(REFERENCE), cell),
            "products": Entrant(Products(), cell),
            "padded": Entrant(_peer("padded tree, dense gradients"), cell),
            "tree": Entrant(TREE, cell),
        },
        lines,
    )


def _tree_and_gensim(name: str, tokens: int, place: dict[str, Any]) -> Race:
    cell = Cell(tokens, 512, 33_278, optim="sgd", **place)
    gensim = _peer("gensim, hierarchical softmax")
    lines = [Line(name, "Huffman tree with update, words a second over gensim's", ratio("gensim", "tree"), at_least=1)]
    if name == "2e":
        longer = ratio("tree", "gensim")
        lines.append(Line("7b", "Huffman tree with update, time a pair of node and token over gensim's", longer,
                          at_most=0.5, stretch=True))  # fmt: skip
    return Race(_sizes(cell), {"gensim": Entrant(gensim, cell, "step"), "tree": Entrant(TREE, cell, "step")}, lines)


def _bands_classes_samples(place: dict[str, Any]) -> Race:
    cell = Cell(1024, 512, 100_000, **place)
    theirs = _peer("torch.nn.AdaptiveLogSoftmaxWithLoss")
    entrants = {"eager": _peer(REFERENCE), "torch": theirs, "usual": USUAL_CUTOFFS, "own": OWN_CUTOFFS,
                "classes": CLASSES, "sampled 1024": SAMPLED_1024, "sampled 8192": SAMPLED_8192,
                "differentiated": DIFFERENTIATED}  # fmt: skip
    eager = "faster than the eager softmax"
    return Race(
        _sizes(cell),
        {key: Entrant(contestant, cell) for key, contestant in entrants.items()},
        [
            Line("3a", "adaptive, cutoffs 5 and 50 %, faster than torch.nn's", ratio("torch", "usual"), at_least=2.2),
            Line("3b", "adaptive, cutoffs=auto, faster than torch.nn's at those", ratio("torch", "own"), at_least=4),
            Line("4a", f"classes, {eager}", ratio("eager", "classes"), at_least=25),
            Line("4b", f"sampled, K 1,024, {eager}", ratio("eager", "sampled 1024"), at_least=80),
            Line("4c", f"sampled, K 8,192, {eager}", ratio("eager", "sampled 8192"), at_least=12),
            Line("4d", f"differentiated, a quarter of the operations, {eager}", ratio("eager", "differentiated"),
                 at_least=3.8),
            Line("7c", f"classes, {eager}", ratio("eager", "classes"), at_least=80, stretch=True),
        ],
    )  # fmt: skip


def _whole_step(place: dict[str, Any], optim: str) -> Race:
    cells = {vocab: Cell(1024, 256, vocab, optim=optim, **place) for vocab in (10_000, 100_000, 1_000_000)}
    largest = 1_000_000
    entrants = {"exact": Entrant(FULL, cells[largest], "step")}
    lines = []
    for letters, name, layer in (("abc", "Huffman tree", TREE), ("def", "sampled, K 1,024", SAMPLED_1024)):
        keys = {vocab: f"{name}, {vocab}" for vocab in cells}
        entrants |= {
            key: Entrant(layer, cells[vocab], "step", measured=vocab == largest) for vocab, key in keys.items()
        }
        share, memory, growth = letters
        lines += [
            Line(f"5{share}", f"{name}, step with optimiser over the exact layer's", percentage(keys[largest], "exact"),
                 at_most=2),
            Line(f"5{memory}", f"{name}, memory of a step beyond parameters and state", beyond_state(keys[largest]),
                 at_most=60),
            Line(f"5{growth}", f"{name}, power of V in the time of a step, from 10,000", exponent(keys), at_most=0.2),
        ]  # fmt: skip
    return Race(_sizes(cells[largest]), entrants, lines)


def _exact_on_cuda(place: dict[str, Any]) -> Race:
    cell = Cell(8192, 2304, 256_000, precision="bf16_parameters", **place)
    return Race(
        _sizes(cell),
        {"products": Entrant(Products(), cell), "exact": Entrant(FULL, cell, measured=True)},
        [
            Line("6a", "exact loss in bf16 over its products by cuBLAS", ratio("exact", "products"), at_most=1.25),
            Line("6b", "exact loss in bf16, memory beyond inputs and gradients", beyond_gradients("exact"),
                 at_most=1.3e9 / 2**20),
        ],
    )  # fmt: skip


def _words_on_cuda(place: dict[str, Any]) -> Race:
    rivals = {"Liger": _peer("Liger-Kernel"), "cut-cross-entropy": _peer("cut-cross-entropy")}
    shapes = [(hidden, vocab) for hidden in (256, 512, 1024) for vocab in (33_278, 267_735, 793_471)]
    entrants = {}
    for hidden, vocab in shapes:
        cell = Cell(2560, hidden, vocab, precision="bf16_parameters", **place)
        for name, contestant in {"exact": FULL, **rivals}.items():
            entrants[f"{name} {hidden} {vocab}"] = Entrant(contestant, cell, measured=True)
    lines = []
    for letters, rival in zip(("cd", "ef"), rivals, strict=True):
        pairs = [(f"{rival} {hidden} {vocab}", f"exact {hidden} {vocab}") for hidden, vocab in shapes]
        speed, memory = letters
        lines += [
            Line(f"6{speed}", f"exact loss in bf16, faster than {rival}, the least", worst_ratio(pairs), at_least=2),
            Line(f"6{memory}", f"exact loss in bf16, memory beyond gradients over {rival}'s, the most",
                 worst_memory([pair[::-1] for pair in pairs]), at_most=1),
        ]  # fmt: skip
    return Race("N 2560, D 256 to 1,024, V 33,278 to 793,471", entrants, lines)


def _adaptive_on_cuda(place: dict[str, Any]) -> Race:
    cell = Cell(2560, 512, 267_735, **place)
    return Race(
        _sizes(cell),
        {"torch": Entrant(_peer("torch.nn.AdaptiveLogSoftmaxWithLoss"), cell), "usual": Entrant(USUAL_CUTOFFS, cell)},
        [Line("6g", "adaptive, cutoffs 5 and 50 %, faster than torch.nn's", ratio("torch", "usual"), at_least=3)],
    )


def _tree_on_cuda(place: dict[str, Any]) -> Race:
    cell = Cell(2560, 512, 793_471, **place)
    return Race(
        _sizes(cell),
        {"exact": Entrant(FULL, cell), "tree": Entrant(TREE, cell)},
        [Line("6h", "Huffman tree, faster than the exact loss", ratio("exact", "tree"), at_least=50)],
    )


def _sizes(cell: Cell) -> str:
    return f"N {cell.tokens}, D {cell.hidden}, V {cell.vocab:,}"


def _peer(label: str) -> Peer:
    return peers([label])[0]


def _without_bf16() -> str:
    """Return that the CPU has no instructions for products in bf16, or an empty string."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "what the CPU can do is not known here"
    return "" if "avx512_bf16" in flags or "amx_bf16" in flags else "the CPU has neither AVX512-BF16 nor AMX"
