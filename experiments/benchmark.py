"""What output layers cost, side by side with what a user would otherwise install: ``python -m experiments.benchmark``.

``study=quick`` (the default), ``layers``, ``vocabulary`` and ``shapes`` time layers and peers over a grid; ``goals``
measures what this project promises of its speed; ``profile`` shows where the time of a training step goes. Everything
lands in ``outputs/benchmark/<study>/``.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from experiments import wording
from experiments.bench import contestants, goals, grid, records, step
from experiments.bench.peers import modules
from experiments.bench.promises import promises
from experiments.cli import CONFIGS, compose_config, guarded, nearest, one_line_errors
from experiments.train import find_device
from lvsoftmax.runs import describe_environment, version

BENCHMARK = CONFIGS / "benchmark"


def run_grid(config: dict[str, Any], output: Path) -> None:
    """Time everybody in every cell; files are written anew after each. A grid that was cut short goes on."""
    study = config["study"]
    settings = grid.Settings(config["rounds"], config["seconds"], config["memory"])
    cells, contestants = grid.plan(study, config["device"], config["optim"])
    environment = describe(config, output)
    surroundings = {name: value for name, value in environment.items() if name not in ("command", "config")}
    who = [[repr(contestant) for contestant in contestants], study["modes"]]
    unfinished = records.Unfinished(output / "unfinished", [surroundings, who, dataclasses.asdict(settings)])
    by_cell = {cell: unfinished.load(cell) for cell in cells}
    pending = [cell for cell in cells if not by_cell[cell]]
    if len(pending) < len(cells):
        print(f"{len(cells) - len(pending)} of {len(cells)} cells were measured before")
    with progress(config["progress"], len(pending)) as advance:
        for cell, here in zip(pending, grid.run(pending, contestants, study["modes"], settings, advance), strict=True):
            unfinished.save(cell, here)
            by_cell[cell] = here
            found = [record for cell in cells for record in by_cell[cell]]
            write(output, "results.csv", records.to_csv(found))
            write(output, "results.md", "\n".join(map(str, records.tables(found))))
            tqdm.write("\n".join(map(str, records.tables(here))), file=sys.stdout)
    found = [record for cell in cells for record in by_cell[cell]]
    unfinished.forget(cells)
    draw(output, "benchmark.html", f"Benchmark {study['name']}", environment, found)


def run_goals(config: dict[str, Any], output: Path) -> None:
    """Measure the promises, for each number of threads; files are written anew after each race."""
    study = config["study"]
    on_cuda = torch.device(config["device"]).type == "cuda"
    programs = {
        "" if len(study["threads"]) == 1 or on_cuda else f"-{threads}-threads": goals.chosen(
            promises(config["device"], config["optim"], threads), study["lines"]
        )
        for threads in (study["threads"][:1] if on_cuda else study["threads"])
    }
    environment = describe(config, output)
    with progress(config["progress"], sum(map(len, programs.values()))) as advance:
        for suffix, races in programs.items():
            results: list[goals.Result] = []
            found: list[records.Record] = []
            for race in races:
                here, behind = goals.measured(race, rounds=config["rounds"], seconds=config["seconds"], advance=advance)
                results += here
                found += behind
                write(output, f"results{suffix}.csv", goals.to_csv(results))
                write(output, f"results{suffix}.md", goals.table(results))
                write(output, f"measurements{suffix}.csv", records.to_csv(found))
                for result in here:
                    tqdm.write("  ".join(filter(None, result.cells())), file=sys.stdout)
            title = suffix.replace("-", " ").strip() or config["device"]
            tqdm.write(f"\n### {title}\n\n{goals.table(results)}", file=sys.stdout)
            draw(output, f"benchmark{suffix}.html", f"Promises of speed, {title}", environment, found, results)
    if not torch.cuda.is_available():
        print("The promises for CUDA are unmeasured: there is no device.")


def run_profile(config: dict[str, Any], output: Path) -> None:
    """Take training steps to pieces, layer by layer; files are written anew after each."""
    study = config["study"]
    chosen = contestants.layers(study["layers"])
    settings = [*study["settings"], f"optim={config['optim']}", f"device={config['device']}", "wandb.mode=disabled"]
    configs = {}
    GlobalHydra.instance().clear()  # this program's own configuration is complete; now for that of another
    for layer in chosen:
        options = [f"output.{name}={json.dumps(value)}" for name, value in layer.options]
        configs[layer.label] = compose_config("train", [*settings, f"output={layer.name}", *options])
    if not configs:
        raise ValueError("study.layers is empty; name at least one")
    describe(config, output)
    profiles: list[step.Profile] = []
    with progress(config["progress"], len(configs)) as advance:
        for label, each in configs.items():
            advance(0, label)
            profiles.append(step.profiled(label, each, study["steps"], study["threads"]))
            advance(1, label)
            write(output, "results.csv", step.to_csv(profiles))
            write(output, "results.md", step.table(profiles))
    print(step.table(profiles))


def describe(config: dict[str, Any], output: Path) -> dict[str, Any]:
    """Write down where this runs, before the first result, and return it."""
    environment = describe_environment(torch.device(config["device"])) | {"config": config}
    environment["peers"] = {module.PACKAGE: version(module.PACKAGE) for module in modules().values()}
    write(output, "environment.json", json.dumps(environment, indent=1))
    return environment


def draw(output: Path, name: str, *told: Any) -> None:
    """Write the page, if what it is made with is installed."""
    try:
        from experiments.bench import page
    except ImportError as error:
        print(f"no page, only the tables: {error}; pip install jinja2 plotly matplotlib")
        return
    write(output, name, page.html(*told))


def write(output: Path, name: str, text: str) -> None:
    """Write a file of the results."""
    output.mkdir(parents=True, exist_ok=True)
    (output / name).write_text(text, encoding="utf-8")


@contextmanager
def progress(shown: bool, parts: int) -> Iterator[Callable[[float, str], None]]:
    """Show a bar; yield the function that moves it on by a share of one of the parts and says what is being done."""
    bar = tqdm(total=parts, disable=not shown, file=sys.stderr, dynamic_ncols=True, leave=False, mininterval=1,
               bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")  # fmt: skip

    def advance(share: float, text: str) -> None:
        bar.set_postfix_str(text, refresh=False)
        bar.update(min(share, parts - bar.n))

    try:
        yield advance
    finally:
        bar.close()


def check(config: dict[str, Any]) -> None:
    """Raise ``ValueError`` for scalars that nobody else checks."""
    for name in ("rounds", "seconds"):
        if not isinstance(config[name], int | float) or config[name] <= 0:
            raise ValueError(f"{name}={config[name]}: must be a positive number")
    threads, many = config["study"]["threads"], config["study"]["kind"] != "profile"
    if many and not isinstance(threads, list):
        raise ValueError(f"study.threads={threads}: must be a list; write study.threads=[{threads}]")
    if not many and not isinstance(threads, int):
        raise ValueError(f"study.threads={threads}: must be one number of threads")
    optims = [file.stem for file in (CONFIGS / "optim").glob("*.yaml")]
    if config["optim"] not in optims:
        raise ValueError(f"optim={config['optim']}: no such choice{nearest(config['optim'], optims)}")


STUDIES = {"grid": run_grid, "goals": run_goals, "profile": run_profile}


@hydra.main(version_base="1.3", config_path=str(BENCHMARK), config_name="benchmark")
def main(composed: DictConfig) -> None:
    """Run a study and say where its results are."""
    start = perf_counter()
    with one_line_errors():
        config = OmegaConf.to_container(
            OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"]), resolve=True
        )
        check(config)
        config["device"] = str(find_device(config["device"]))
        output = Path(config["run"]["root"]) / "benchmark" / config["study"]["name"]
        STUDIES[config["study"]["kind"]](config, output)
    print(f"{wording.duration(perf_counter() - start)} in all; {output}")


if __name__ == "__main__":
    guarded(main, "benchmark", BENCHMARK)
