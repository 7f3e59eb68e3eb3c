"""Train one language model: ``python -m experiments.train output=sampled_softmax data=sotu seed=2``.

Reads from top to bottom: set up, resume, step, validate, finish. Everything a run leaves behind is in its folder (see
:mod:`lvsoftmax.runs`); the same command goes on where a killed one stopped, and does nothing once it is done.
"""

import math
import sys
from time import perf_counter
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from experiments.cli import CONFIGS, guarded, one_line_errors, resolved
from experiments.timing import DeviceClock
from experiments.tracking import Tracker
from lvsoftmax.cost import count_work, peak_bytes, reset_peak
from lvsoftmax.data.batches import Batch, ContiguousBatches
from lvsoftmax.evaluate import evaluate, temperature_of
from lvsoftmax.layer import OutputLayer
from lvsoftmax.ops.backends import compile_all
from lvsoftmax.optim import clip_gradient_norm
from lvsoftmax.runs import (
    RunFolder,
    build,
    build_model,
    build_optimiser,
    folder_for,
    given,
    identity,
    stream,
    with_output,
)

WARM_UP = 10
"""Steps after which memory is measured: first steps allocate what later ones reuse."""

LIMITS = ("epochs", "tokens", "seconds")
"""What a budget may name; the first one reached ends the run."""

NULLABLE = ("optim.clip", "evaluate.tokens", "evaluate.final_tokens", "evaluate.every_tokens", "evaluate.every_seconds")
"""Numbers that may be left out, beside the limits of a budget."""


def train(config: dict[str, Any]) -> dict[str, Any] | None:
    """Run one configured training to its budget's end and return its result; None when it diverged.

    Raises:
        ValueError: the configuration cannot run, or not go on with what its folder holds, which then stays.
    """
    check(config)
    device = find_device(config["device"])

    # Set up: text, schedule, folder, model, optimiser. Nothing is written before all of it has been built.
    corpus = build(config["data"])
    schedule = build(config["schedule"])
    follows_budget = schedule.depends_on_budget
    run_identity = identity(config, corpus.digest, follows_budget=follows_budget)
    folder = RunFolder(folder_for(config, corpus.digest, follows_budget=follows_budget), run_identity)
    if folder.result and overspent(config["budget"], **folder.result["train"]):
        raise beyond(folder, **folder.result["train"])
    if folder.result and spent(config["budget"], **folder.result["train"]) >= 1:
        print(f"{folder.path} is finished: test perplexity {perplexity(folder.result['test'])}")
        return folder.result
    config = folder.settled(config)
    arrays = given(config, corpus)
    model = build_model(config, torch.from_numpy(corpus.vocabulary.counts), arrays).to(device)
    output = model.output
    config = with_output(config, output.resolved())
    backend = output.chosen_backend(device)
    optim = config["optim"]
    optimiser = build_optimiser(optim, model)
    compile_all(device)  # of the optimiser and of the layer's other operations, too, before any step is timed
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    base_rates = [group["lr"] for group in optimiser.param_groups]

    batch, start_id = config["batch"], corpus.vocabulary.eos
    batches = ContiguousBatches(corpus.train, batch["size"], batch["length"], start=start_id, complete=False)
    steps_per_epoch = len(batches) // optim["accumulate"]
    if not steps_per_epoch:
        raise ValueError(
            f"batch.size={batch['size']} x batch.length={batch['length']} x optim.accumulate={optim['accumulate']} "
            f"exceeds the {len(corpus.train)} tokens of the training text; lower them"
        )
    tokens_per_step = batch["size"] * batch["length"] * optim["accumulate"]

    def memory() -> int:
        return max(peak, peak_bytes(device) if step - first_step > WARM_UP else 0)

    def pieces(text: Any, tokens: int | None = None) -> ContiguousBatches:
        size, length = config["evaluate"]["size"], config["evaluate"]["length"]
        return ContiguousBatches(text[:tokens], size, length, start=start_id, complete=True)

    def evaluation(text: Any, tokens: int | None = None, **options: Any) -> dict[str, Any]:
        counts, source = torch.from_numpy(corpus.vocabulary.counts), corpus.source
        with autocast(config, device):
            return evaluate(model, pieces(text, tokens), counts=counts, source=source, **options)

    # Resume from the last checkpoint, or start; a result that is there stays until it is known that the run can go on.
    folder.claim()
    torch.manual_seed(stream(config["seed"], "dropout"))
    step = 0
    seconds = 0.0
    state = None
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    since_log = {"steps": 0, "seconds": 0.0, "output_seconds": 0.0}
    output_seconds = 0.0
    peak = 0
    next_valid = {"tokens": config["evaluate"]["every_tokens"], "seconds": config["evaluate"]["every_seconds"]}
    checkpoint = folder.restore()
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimiser.load_state_dict(checkpoint["optimiser"])
        schedule.load_state_dict(checkpoint["schedule"])
        output.load_generator_state(checkpoint["generators"])
        torch.set_rng_state(checkpoint["rng"])
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:  # a run may have begun on the CPU
            torch.cuda.set_rng_state(checkpoint["cuda_rng"], device)
        step, seconds = checkpoint["step"], checkpoint["seconds"]
        output_seconds, peak = checkpoint["output_seconds"], checkpoint["peak"]
        loss_sum += checkpoint["loss_sum"]
        since_log, next_valid = checkpoint["since_log"], checkpoint["next_valid"]
        state = to_device(checkpoint["state"], device)
        reached = {"steps": step, "tokens": step * tokens_per_step, "epochs": step / steps_per_epoch}
        if overspent(config["budget"], **reached):
            raise beyond(folder, **reached)
    del checkpoint  # it is a second copy of every parameter
    folder.start(config, corpus.vocabulary, arrays, device, backend)
    tracker = Tracker(folder.path, config, folder.wandb_id)

    def drain() -> None:
        """Take the clock's time in the output layer into account; on CUDA this waits for the work under way."""
        nonlocal seconds, output_seconds
        began = perf_counter()
        spent_on_output = clock.drain()
        output_seconds += spent_on_output
        since_log["output_seconds"] += spent_on_output
        if device.type == "cuda":  # work of the steps that are counted already
            waited = perf_counter() - began
            seconds += waited
            since_log["seconds"] += waited

    def save() -> None:
        drain()
        folder.save({
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "schedule": schedule.state_dict(),
            "generators": output.generator_state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "step": step,
            "seconds": seconds,
            "output_seconds": output_seconds,
            "peak": memory(),
            "loss_sum": loss_sum.item(),
            "since_log": since_log,
            "next_valid": next_valid,
            "state": state,
        })  # fmt: skip

    def log(kind: str, **values: Any) -> None:
        moment = {"step": step, "tokens": step * tokens_per_step, "epoch": step / steps_per_epoch}
        folder.log(kind=kind, **moment, **values, seconds=seconds)
        tracker.log(step, {kind: values | {"seconds": seconds}, "tokens": moment["tokens"], "epoch": moment["epoch"]})

    def progress_made() -> float:
        return spent(config["budget"], tokens=step * tokens_per_step, epochs=step / steps_per_epoch, seconds=seconds)

    bar = tqdm(
        total=100, initial=round(100 * min(progress_made(), 1), 1), disable=not config["progress"], file=sys.stderr,
        desc=f"{config['name']['output']} on {config['name']['data']}", unit="%", dynamic_ncols=True,
        bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}",
    )  # fmt: skip
    clock = DeviceClock(device)
    last_save = perf_counter()
    first_step = step
    valid: dict[str, Any] = {}

    while progress_made() < 1:
        # One optimiser step over `accumulate` stretches of text.
        started = perf_counter()
        epoch, position = divmod(step, steps_per_epoch)
        factor = schedule.factor(epoch, progress_made())
        for group, rate in zip(optimiser.param_groups, base_rates, strict=True):
            group["lr"] = rate * factor
        if position % batch["stretch"] == 0:
            first = position * optim["accumulate"]
            last = min(first + batch["stretch"] * optim["accumulate"], len(batches))
            coming = torch.cat([batches[i].target.flatten() for i in range(first, last)]).to(device)
            mark = clock.mark()
            output.observe(coming)
            output.refresh()
            clock.add(mark)
        if position == 0:
            state = None
        for part in range(optim["accumulate"]):
            piece = batches[position * optim["accumulate"] + part]
            ids, target = piece.input.to(device), piece.target.flatten().to(device)
            with autocast(config, device):
                hidden, state = model.hidden(ids, state)
            # The graph is cut at the hidden vectors: the output layer's share of the step is measured exactly, and its
            # memory is free before the backbone's backward pass begins.
            leaf = hidden.detach().requires_grad_()
            mark = clock.mark()
            with autocast(config, device):
                weight = torch.full(target.shape, 1 / tokens_per_step, device=device)
                loss = output.loss(leaf, target, weight, ids.flatten())
            loss.backward()
            clock.add(mark)
            hidden.backward(leaf.grad)
            loss_sum += loss.detach()
        norm = clip_gradient_norm(parameters, math.inf if optim["clip"] is None else optim["clip"])
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        elapsed = perf_counter() - started
        seconds += elapsed
        since_log["steps"] += 1
        since_log["seconds"] += elapsed
        if step - first_step == WARM_UP:
            reset_peak(device)

        # Log, validate, save: at fixed steps or tokens, so that a resumed run does the same at the same places.
        done = progress_made() >= 1
        tokens = step * tokens_per_step
        regular = step % steps_per_epoch == 0 or due(next_valid, tokens=tokens, seconds=seconds)
        validate = done or regular
        if step % config["log_every"] == 0 or validate:
            drain()
            mean_loss = loss_sum.item() / since_log["steps"]
            if not math.isfinite(mean_loss):
                bar.close()
                log("diverged", loss=mean_loss)
                tracker.finish({"status": "diverged"})
                message = f"stopped: the training loss is {mean_loss} at step {step}; lower optim.learning_rate="
                print(message + f"{optim['learning_rate']} or optim.clip={optim['clip']}", file=sys.stderr)
                return None
            speed = since_log["steps"] * tokens_per_step / since_log["seconds"]
            log(
                "train", loss=mean_loss, learning_rate=optimiser.param_groups[0]["lr"], gradient_norm=norm.item(),
                tokens_per_second=speed, output_share=since_log["output_seconds"] / since_log["seconds"],
                peak_bytes=memory(), diagnostics=output.diagnostics(),
            )  # fmt: skip
            loss_sum.zero_()
            since_log = dict.fromkeys(since_log, 0)
            bar.set_postfix_str(
                f", step {step}, loss {mean_loss:.3f}, {speed:,.0f} tokens/s"
                + (f", valid perplexity {perplexity(valid)}" if valid else "")
            )
        bar.update(round(100 * min(progress_made(), 1), 1) - bar.n)
        if validate:
            peak = memory()  # of training: the measurement begins anew after the evaluation
            valid = evaluation(corpus.valid, config["evaluate"]["tokens"], full=False)
            if regular:  # where a budget ends is no matter of the schedule: a larger one may continue the run
                # An infinite loss could not be seen to improve.
                schedule.observe(valid["nll"] if output.full_support else math.log(valid["epsilon_perplexity"]))
            next_valid = {key: after(config["evaluate"][f"every_{key}"], value) for key, value in
                          {"tokens": tokens, "seconds": seconds}.items()}  # fmt: skip
            reset_peak(device)
            log("valid", **{key: value for key, value in valid.items() if key not in ("tokens", "epsilon")})
        if not done and perf_counter() - last_save > config["checkpoint_every"]:
            save()
            last_save = perf_counter()
    save()
    bar.close()

    # What a step costs, counted on the last one: in plain PyTorch, since other backends work out of sight.
    last = batches[(step - 1) % steps_per_epoch * optim["accumulate"]]
    counted = output
    if step == first_step:  # resumed at its budget's end
        output.observe(last.target.flatten().to(device))
    if "backend" in config["output"]:
        counts = torch.from_numpy(corpus.vocabulary.counts)
        counted = build_model({**config, "backend": "eager"}, counts, arrays).output.to(device)
        counted.load_state_dict(output.state_dict())
    with autocast(config, device):
        flops = output_flops(counted, model.hidden(last.input.to(device), None)[0], last, device)

    # Finish: exact evaluation, then the result, whose existence means done. The temperature that the test
    # is tried at comes from the validation text.
    with autocast(config, device):
        temperature = temperature_of(model, pieces(corpus.valid, config["evaluate"]["final_tokens"]))
    sizes = {"output": count(output), "backbone": count(model.backbone), "total": count(model)}
    result = {
        "status": "finished",
        "vocabulary": len(corpus.vocabulary),
        "valid": evaluation(corpus.valid, config["evaluate"]["final_tokens"], temperature=temperature),
        "test": evaluation(corpus.test, config["evaluate"]["final_tokens"], temperature=temperature),
        "train": {
            "tokens": step * tokens_per_step, "seconds": seconds, "tokens_per_second": step * tokens_per_step / seconds,
            "output_share": output_seconds / seconds, "steps": step, "epochs": step / steps_per_epoch,
            "output_flops_per_token": flops,
        },
        "memory": {"peak_bytes": peak},
        "parameters": sizes | {"embedding": sizes["total"] - sizes["output"] - sizes["backbone"]},
    }  # fmt: skip
    folder.finish(result)
    tracker.finish(result)
    print(
        f"{folder.path}: valid perplexity {perplexity(result['valid'])}, test perplexity {perplexity(result['test'])}, "
        f"{result['train']['tokens_per_second']:,.0f} tokens/s"
    )
    return result


def output_flops(output: OutputLayer, hidden: Tensor, batch: Batch, device: torch.device) -> float:
    """Return the operations of the training loss and its gradients in the output layer, counted, for each token."""
    leaf = hidden.detach().requires_grad_()
    target, previous = batch.target.flatten().to(device), batch.input.flatten().to(device)
    weight = torch.full(target.shape, 1 / len(target), device=device)
    work = count_work(lambda: output.loss(leaf, target, weight, previous).backward())
    output.zero_grad()
    return work.flops / len(target)


def check(config: dict[str, Any]) -> None:
    """Raise ``ValueError`` for scalars that no group has checked."""
    if config["precision"] not in ("fp32", "bf16"):
        raise ValueError(f"precision={config['precision']}: choose fp32 or bf16")
    if config["wandb"]["mode"] not in ("offline", "online", "disabled"):
        raise ValueError(f"wandb.mode={config['wandb']['mode']}: choose offline, online or disabled")
    budget = config["budget"]
    for name in budget.keys() - set(LIMITS):
        raise ValueError(f"budget.{name}={budget[name]}: no such limit; choose one of {', '.join(LIMITS)}")
    if all(value is None for value in budget.values()):
        raise ValueError("budget is empty, the run would never end; set budget.epochs, budget.tokens or budget.seconds")
    positive = {f"budget.{key}": value for key, value in budget.items()}
    positive |= {f"batch.{key}": value for key, value in config["batch"].items()}
    positive |= {f"evaluate.{key}": value for key, value in config["evaluate"].items()}
    positive |= {"optim.accumulate": config["optim"]["accumulate"], "optim.clip": config["optim"]["clip"]}
    positive |= {"optim.learning_rate": config["optim"]["learning_rate"], "log_every": config["log_every"]}
    for name, value in positive.items():
        if value is None and (name in NULLABLE or name.startswith("budget.")):
            continue
        if not (isinstance(value, int | float) and value > 0):
            raise ValueError(f"{name}={value}: must be a positive number")
    counts = {name for name in positive if not name.startswith("budget.") and not name.endswith("_seconds")}
    for name in counts - {"optim.clip", "optim.learning_rate"}:
        if isinstance(positive[name], float):
            raise ValueError(f"{name}={positive[name]}: must be a whole number; write {round(positive[name])}")
    seconds = config["checkpoint_every"]
    if not (isinstance(seconds, int | float) and seconds >= 0):
        raise ValueError(f"checkpoint_every={seconds}: must be a number of seconds, 0 for one at every step")


def find_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is CUDA where there is one.

    Raises:
        ValueError: there is no such device here, or it is neither the CPU nor CUDA's.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = None
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type in ("cpu", "cuda"):  # clocks and memory know these two only
            return device
    except (RuntimeError, AssertionError) as error:
        reason = error
    here = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    raise ValueError(f"device={name} is not there; choose one of auto, {', '.join(here)}") from reason


def autocast(config: dict[str, Any], device: torch.device) -> torch.autocast:
    """Return the context that runs matrix products in bf16 when the configuration asks for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config["precision"] == "bf16")


def spent(budget: dict[str, Any], *, tokens: float, epochs: float, seconds: float, **_: Any) -> float:
    """Return the share of the budget that is used up; 1 or more ends the run."""
    used = {"tokens": tokens, "epochs": epochs, "seconds": seconds}
    return max(used[key] / limit for key, limit in budget.items() if limit is not None)


def overspent(budget: dict[str, Any], *, steps: int, tokens: float, epochs: float, **_: Any) -> bool:
    """Return whether a run has read more than a budget allows, so that its last step began beyond it.

    Seconds do not count: no two runs take the same.
    """
    before = 1 - 1 / max(steps, 1)
    limits = {key: limit for key, limit in budget.items() if key != "seconds" and limit is not None}
    return bool(limits) and spent(limits, tokens=tokens * before, epochs=epochs * before, seconds=0) >= 1


def beyond(folder: RunFolder, *, tokens: float, epochs: float, **_: Any) -> ValueError:
    """Return the error for a run that has been trained for longer than is asked now."""
    return ValueError(
        f"{folder.path} has been trained on {tokens:,} tokens, {epochs:.3g} epochs, beyond this budget; ask for more, "
        "or set run.root or run.dir to another folder"
    )


def perplexity(figures: dict[str, Any]) -> str:
    """Return a text's perplexity for people; where it is infinite, with what it is when smoothed."""
    if not math.isinf(figures["perplexity"]):
        return f"{figures['perplexity']:.2f}"
    return f"infinite (smoothed {figures.get('epsilon_perplexity', math.inf):.2f})"


def due(limits: dict[str, float | None], **values: float) -> bool:
    """Return whether one of the values has reached its limit."""
    return any(limit is not None and values[key] >= limit for key, limit in limits.items())


def after(interval: float | None, value: float) -> float | None:
    """Return the first multiple of the interval beyond ``value``."""
    return None if interval is None else (value // interval + 1) * interval


def to_device(state: Any, device: torch.device) -> Any:
    """Move a backbone's carried state, nested tuples of tensors."""
    if isinstance(state, tuple | list):
        return tuple(to_device(part, device) for part in state)
    return None if state is None else state.to(device)


def count(module: torch.nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(config: DictConfig) -> None:
    """Compose the configuration and train."""
    with one_line_errors():
        hydra_config = HydraConfig.get()
        # One that diverges ends no sweep.
        if train(resolved(config, hydra_config.runtime.choices)) is None and hydra_config.mode is RunMode.RUN:
            sys.exit(1)


if __name__ == "__main__":
    guarded(main, "train")
