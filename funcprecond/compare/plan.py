"""The plan of a comparison: its rows, and the configurations that identify their cells.

A row is a method with a batch size and an interval. Its cells are one cost measurement and the
training runs at each learning rate and seed.
"""

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import funcprecond as fp
from funcprecond.compare.recipe import momentum, options
from funcprecond.compare.tasks import Task
from funcprecond.methods.card import CARDS

# Sources that only affect how results are shown. A change of these does not invalidate the results.
PRESENTATION = {"compare/report", "compare/cli.py", "compare/progress.py", "compare/summary.py"}


@dataclass(frozen=True)
class Setting:
    """One row of the comparison.

    Attributes:
        task: a name in `TASKS`.
        method: a name in `CARDS`.
        batch_size: the number of examples per batch.
        interval: the number of steps between two measurements of the curvature, and between two
            preparations of the solver's factor; None for a method without such an interval.
        steps: the number of steps per training run.
        device: the name of the device in torch.
        threads: the number of CPU threads of torch.
    """

    task: str
    method: str
    batch_size: int
    interval: int | None
    steps: int
    device: str
    threads: int

    def label(self) -> str:
        """The method, batch size and interval as text."""
        interval = "" if self.interval is None else f", interval {self.interval}"
        return f"{self.method} (batch {self.batch_size}{interval})"

    def config(self, kind: str, **more: Any) -> dict[str, Any]:
        """The full configuration of one cell of this row.

        Args:
            kind: "cost" or "train".
            more: the entries that distinguish this cell from the other cells of the row (learning
                rate and seed).

        Returns:
            Everything that determines the result of the cell.
        """
        return {
            "kind": kind,
            **asdict(self),
            "options": {name: repr(value) for name, value in options(self.method, None).items()},
            "momentum": momentum(self.method),
            **more,
            "environment": environment(self.device),
        }


def settings(
    task: Task,
    methods: Sequence[str],
    batch_sizes: Sequence[int],
    intervals: Sequence[int],
    steps: int,
    device: str,
    threads: int,
) -> list[Setting]:
    """The rows of the comparison, in the order of methods, then batch sizes, then intervals.

    A method without intervals has one row per batch size.
    """
    return [
        Setting(task.name, method, batch_size, interval, steps, device, threads)
        for method in methods
        for batch_size in batch_sizes
        for interval in (intervals if CARDS[method].has_intervals else [None])
    ]


@cache
def environment(device: str) -> dict[str, str]:
    """The code, versions and machine that determine a result besides the settings.

    A stored cell is only used if all of them are the same.
    """
    return {
        "code": code_digest(),
        "funcprecond": fp.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device_name": device_name(device),
    }


def device_name(device: str) -> str:
    """The name of the accelerator or of the processor, if the system provides it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def code_digest() -> str:
    """A digest of the package's sources, except for those that only present results."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not any(name == part or name.startswith(part + "/") for part in PRESENTATION):
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
