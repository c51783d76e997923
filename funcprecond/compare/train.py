"""A training run of one method at one learning rate and seed."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import funcprecond as fp
from funcprecond.compare.data import Data, Split, batches
from funcprecond.compare.plan import Setting
from funcprecond.compare.recipe import recipe
from funcprecond.compare.results import points
from funcprecond.compare.tasks import TASKS
from funcprecond.problems import Problem

CHUNK = 512  # the number of examples that are evaluated at a time


def train(
    setting: Setting,
    data: Data,
    learning_rate: float,
    seed: int,
    on_step: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:
    """Train once, and evaluate.

    Args:
        setting: the task, method, batch size, interval, steps and device.
        data: the data of the task on that device.
        learning_rate: the factor of the method's direction.
        seed: determines the weights, the order of the batches, and the random numbers of the
            method.
        on_step: a function that is called with the number of finished steps at each point of the
            curve.

    Returns:
        A dict with these entries: `status`, which is "ok" or "diverged"; `why`, if the run
        diverged, because the loss was not finite or ended at twice the loss of guessing or above;
        `curve` with the lists `step`, `seconds` (spent in the steps) and `loss`; `seconds`, the
        time of all steps; and, if the run did not diverge, `validation` and `test`, each with
        `accuracy` and `loss`.
    """
    task = TASKS[setting.task]
    device = torch.device(setting.device)
    problem = fp.problem(task.model(data, seed, device), fp.losses.cross_entropy)
    transform = recipe(setting.method, learning_rate, setting.interval, task.ends)
    step = fp.make_step(problem, transform, compile=False)
    params = problem.params
    state = transform.init(params)
    # The order is drawn on the CPU, so that the batches are the same on every device.
    stream = batches(data.train, setting.batch_size, torch.Generator().manual_seed(seed))
    generator = torch.Generator(device).manual_seed(seed)

    curve: dict[str, list[float]] = {"step": [], "seconds": [], "loss": []}
    result: dict[str, Any] = {"status": "ok", "curve": curve}
    ends = set(points(setting.steps))
    losses: list[Tensor] = []
    seconds = 0.0
    started = clock(device)
    for t in range(setting.steps):
        batch = next(stream)
        noise = fp.draw(problem, params, batch, transform.needs(t), generator=generator)
        params, state, evidence = step(params, state, batch, t, noise)
        losses.append(evidence.loss)
        if t + 1 in ends:
            seconds += clock(device) - started
            loss = torch.stack(losses).mean().item()
            losses.clear()
            for name, value in (("step", t + 1), ("seconds", seconds), ("loss", loss)):
                curve[name].append(value)
            on_step(t + 1)
            if not math.isfinite(loss):
                why = f"the training loss was no longer finite at step {t + 1}"
                return result | {"status": "diverged", "why": why, "seconds": seconds}
            started = clock(device)
    figures = {
        "validation": evaluate(problem, params, data.validation),
        "test": evaluate(problem, params, data.test),
    }
    reached, guessing = figures["validation"]["loss"], math.log(data.classes)
    if not reached < 2 * guessing:
        why = (
            f"the validation loss ended at {reached:.3g} nats, at least twice that of guessing "
            f"({guessing:.2g})"
        )
        return result | {"status": "diverged", "why": why, "seconds": seconds}
    if not math.isfinite(figures["test"]["loss"]):
        why = "the loss on the test split is not finite"
        return result | {"status": "diverged", "why": why, "seconds": seconds}
    return result | figures | {"seconds": seconds}


@torch.no_grad()
def evaluate(problem: Problem, params: dict[str, Tensor], split: Split) -> dict[str, float]:
    """The accuracy and the mean loss (in nats) over all terms of a split.

    Args:
        problem: the model.
        params: the parameters of the model.
        split: the examples.
    """
    correct = loss = terms = 0.0
    for start in range(0, len(split), CHUNK):
        inputs = split.inputs[start : start + CHUNK]
        targets = split.targets[start : start + CHUNK]
        outputs = problem(params, inputs)
        correct += (outputs.argmax(-1) == targets).sum().item()
        loss += fp.losses.cross_entropy(outputs, targets).item() * targets.numel()
        terms += targets.numel()
    return {"accuracy": correct / terms, "loss": loss / terms}


def clock(device: torch.device) -> float:
    """The time in seconds, after the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
