"""The settings and the environment of a comparison, as text for the report."""

import os
from datetime import datetime

from funcprecond.compare.data import Data
from funcprecond.compare.engine import Engine
from funcprecond.compare.plan import environment
from funcprecond.compare.recipe import FOR_HIDDEN_MATRICES, MOMENTUM, WARM_UP, momentum, options
from funcprecond.compare.tasks import Task


def about(engine: Engine, data: Data, task: Task) -> dict[str, str]:
    """Everything that a reader needs in order to judge or repeat the results, by name."""
    first = engine.rows[0]
    methods = list(dict.fromkeys(row.method for row in engine.rows))
    settings = {
        method: ", ".join(f"{name}={value!r}" for name, value in options(method, None).items())
        for method in methods
    }
    batch_sizes = listed(row.batch_size for row in engine.rows)
    intervals = listed(row.interval for row in engine.rows if row.interval)
    here = environment(first.device)
    model = task.model(data, 0, engine.data.train.inputs.device)
    weights = sum(parameter.numel() for parameter in model.parameters())
    without = [method for method in methods if not momentum(method)]
    return {
        "task": f"{task.name}: {task.title}, {weights:,} weights, cross-entropy",
        "data": data.description,
        "batch sizes": batch_sizes,
        "intervals": intervals or "none, because no method of this comparison has one",
        "steps per run": str(first.steps),
        "seeds": f"{listed(engine.seeds)}; the learning rate is swept with the first one",
        "learning rates": (
            f"{engine.points} at first, in half decades around the method's own learning rate, and "
            "more if the best one is at the edge; chosen by the loss on the validation split"
        ),
        "momentum": f"{MOMENTUM} after every method"
        + (f" except {', '.join(without)}" if without else ""),
        **(
            {"with Adam": f"{', '.join(routed)} trains hidden matrices, and adam all the rest"}
            if (routed := [method for method in methods if method in FOR_HIDDEN_MATRICES])
            else {}
        ),
        "warm-up": f"methods with an interval refresh at each of the first {WARM_UP} steps",
        "options": "; ".join(f"{method}: {text}" for method, text in settings.items() if text)
        or "the defaults of the methods",
        "device": f"{first.device}, {here['device_name']}",
        "threads": f"{first.threads} of {os.cpu_count()} processors",
        "software": f"torch {here['torch']}, Python {here['python']}, {here['system']}, "
        f"funcprecond {here['funcprecond']} (code {here['code']})",
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "to repeat": (
            f"python -m funcprecond compare --task {task.name} --methods {','.join(methods)} "
            f"--batch-sizes {batch_sizes.replace(' ', '')} "
            + (f"--intervals {intervals.replace(' ', '')} " if intervals else "")
            + f"--seeds {listed(engine.seeds).replace(' ', '')} --steps {first.steps} "
            f"--sweep {engine.points} --device {first.device} --threads {first.threads}"
        ),
    }


def listed(values) -> str:
    """The distinct values in order, separated by commas."""
    return ", ".join(dict.fromkeys(str(value) for value in values))
