"""Where the time of a training step goes, layer by layer: the step of ``experiments.train`` taken to pieces."""

import csv
import dataclasses
import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.profiler import profile, record_function

from experiments import wording
from experiments.bench.cell import Cell
from experiments.bench.race import clock_of
from experiments.bench.records import markdown
from experiments.train import autocast
from lvsoftmax.data.batches import ContiguousBatches
from lvsoftmax.models.language_model import detached
from lvsoftmax.optim import clip_gradient_norm
from lvsoftmax.runs import asked_of_text, build, build_model, build_optimiser, stream

PARTS = ("data", "announcement", "embedding", "backbone", "output", "clipping", "optimiser")
"""Of a step, in order; the announcement is ``observe`` and ``refresh``."""

MODEL = ("backbone", "output")
"""What may take its time; every other part is to take at most ``LIMIT`` of the step."""

LIMIT = 0.1
WARM_UP = 5
CLOSER_LOOK = 10
"""Steps in which operations are told apart."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """One layer's step.

    Attributes:
        label: the layer.
        seconds: of a step, mean.
        shares: of each part; what is between them is ``rest``.
        blame: of each part beyond its limit, the operations that take most of the step, with their shares.
    """

    label: str
    seconds: float
    shares: dict[str, float]
    blame: dict[str, list[tuple[str, float]]]

    @property
    def beyond(self) -> list[str]:
        """The parts that take more than they may."""
        return [part for part, share in self.shares.items() if part not in MODEL and share > LIMIT]


class Step:
    """A model in training, whose ``run`` is a step of ``experiments.train`` with a context around each part.

    Args:
        config: as of ``experiments.train``.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.device = torch.device(config["device"])
        corpus = build(config["data"])
        statistics = {name: corpus.statistic(name) for name in asked_of_text(config)}
        self.model = build_model(config, torch.from_numpy(corpus.vocabulary.counts), statistics).to(self.device)
        self.optimiser = build_optimiser(config["optim"], self.model)
        self.parameters = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        batch = config["batch"]
        self.batches = ContiguousBatches(
            corpus.train, batch["size"], batch["length"], start=corpus.vocabulary.eos, complete=False
        )
        self.state = None
        self.number = 0
        torch.manual_seed(stream(config["seed"], "dropout"))

    def run(self, part: Callable[[str], Any]) -> torch.Tensor:
        """Take one step; ``part`` gives the context of each part by its name. Return the loss."""
        model, config, batch = self.model, self.config, self.config["batch"]
        tokens = batch["size"] * batch["length"]
        position = self.number % len(self.batches)
        if position == 0:
            self.state = None
        with part("data"):
            piece = self.batches[position]
            ids, target = piece.input.to(self.device), piece.target.flatten().to(self.device)
            weight = torch.full(target.shape, 1 / tokens, device=self.device)
        if position % batch["stretch"] == 0:
            with part("announcement"):
                last = min(position + batch["stretch"], len(self.batches))
                coming = [self.batches[i].target.flatten() for i in range(position, last)]
                model.output.observe(torch.cat(coming).to(self.device))
                model.output.refresh()
        with part("embedding"), autocast(config, self.device):
            embedded = model.dropout(model.embed(ids))
            words = embedded.detach().requires_grad_()
        with part("backbone"), autocast(config, self.device):
            hidden, state = model.backbone(words, self.state)
            hidden, self.state = model.dropout(hidden).flatten(0, 1), detached(state)
            leaf = hidden.detach().requires_grad_()
        with part("output"), autocast(config, self.device):
            loss = model.output.loss(leaf, target, weight, ids.flatten())
        with part("output"):
            loss.backward()
        with part("backbone"):
            hidden.backward(leaf.grad)
        with part("embedding"):
            embedded.backward(words.grad)
        with part("clipping"):
            clip = config["optim"]["clip"]
            clip_gradient_norm(self.parameters, math.inf if clip is None else clip)
        with part("optimiser"):
            self.optimiser.step()
            self.optimiser.zero_grad()
        self.number += 1
        return loss.detach()


def profiled(label: str, config: Mapping[str, Any], steps: int, threads: int) -> Profile:
    """Measure the parts of a number of steps after a few to warm up; then look closer at those beyond their limit."""
    torch.set_num_threads(threads)
    step = Step(config)
    _, clock = clock_of(Cell(1, 1, 2, threads=threads, device=str(step.device)))
    spent: dict[str, float] = defaultdict(float)

    def now() -> float:
        if step.device.type == "cuda":
            torch.cuda.synchronize(step.device)
        return clock()

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        start = now()
        yield
        spent[part] += now() - start

    for _ in range(WARM_UP):
        step.run(lambda part: nullcontext())
    step.number += -step.number % config["batch"]["stretch"]  # whole stretches, so that announcements have their share
    start = now()
    for _ in range(steps):
        step.run(timed)
    whole = now() - start
    shares = {part: spent[part] / whole for part in PARTS} | {"rest": 1 - sum(spent.values()) / whole}
    found = Profile(label, whole / steps, shares, {})
    return dataclasses.replace(found, blame=_blame(step, found.beyond)) if found.beyond else found


def _blame(step: Step, parts: Sequence[str]) -> dict[str, list[tuple[str, float]]]:
    """Return the operations that take most of the time of some parts, as shares of the step."""
    with profile() as trace:
        for _ in range(CLOSER_LOOK):
            with record_function("step"):
                step.run(lambda part: record_function(f"part {part}"))
    spent: dict[str, dict[str, float]] = {part: defaultdict(float) for part in parts}
    whole = 0.0
    for event in trace.events():
        if event.name == "step":
            whole += event.cpu_time_total
        above = event
        while above is not None and not above.name.startswith("part "):
            above = above.cpu_parent
        part = above.name.removeprefix("part ") if above is not None else ""
        if part in spent and above is not event:
            spent[part][event.name] += event.self_cpu_time_total
    return {
        part: sorted(((name, time / whole) for name, time in times.items()), key=lambda pair: -pair[1])[:3]
        for part, times in spent.items()
    }


def table(profiles: Iterable[Profile]) -> str:
    """Return the shares as a table in Markdown, and what is to blame where a part takes more than it may."""
    profiles = list(profiles)
    lines = [["", "step, ms", *PARTS, "rest"]]
    for found in profiles:
        shares = [f"{100 * share:.1f} %" for share in found.shares.values()]
        lines.append([found.label, wording.figures(1000 * found.seconds), *shares])
    said = []
    for found in profiles:
        for part in found.beyond:
            causes = wording.listing([f"{name} {100 * share:.0f} %" for name, share in found.blame.get(part, [])])
            said.append(f"- {found.label}: {part} takes {100 * found.shares[part]:.0f} % of the step: {causes}")
    within = f"No part but {' and '.join(MODEL)} takes more than {100 * LIMIT:.0f} % of any step."
    return markdown(lines) + "\n" + ("\n".join(said) or within) + "\n"


def to_csv(profiles: Iterable[Profile]) -> str:
    """Return a line for each layer, shares of the step."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["layer", "seconds", *PARTS, "rest"])
    writer.writerows([found.label, found.seconds, *found.shares.values()] for found in profiles)
    return text.getvalue()
