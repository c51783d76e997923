"""What a comparison consists of: rows, and cells keyed by everything that decides them."""

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

# Changing how results look must not throw results away.
PRESENTATION = {"compare/report", "compare/cli.py", "compare/progress.py", "compare/summary.py"}


@dataclass(frozen=True)
class Setting:
    """One row of the comparison.

    Attributes:
        task: name in `TASKS`.
        method: name in `CARDS`.
        batch_size: examples in a batch.
        interval: steps between two measurements of the curvature, and two preparations of the
            solver's factor; None for a method that has no such interval.
        steps: steps of each training run.
        device: as torch writes it.
        threads: torch's CPU threads.
    """

    task: str
    method: str
    batch_size: int
    interval: int | None
    steps: int
    device: str
    threads: int

    def label(self) -> str:
        """Method, batch size and interval, for one line of a log."""
        interval = "" if self.interval is None else f", interval {self.interval}"
        return f"{self.method} (batch {self.batch_size}{interval})"

    def config(self, kind: str, **more: Any) -> dict[str, Any]:
        """Full configuration of one cell of this row.

        Args:
            kind: "cost" or "train".
            more: what tells this cell from the row's others (learning rate, seed).
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
    """Rows in the order methods, batch sizes, intervals; without intervals, one row."""
    return [
        Setting(task.name, method, batch_size, interval, steps, device, threads)
        for method in methods
        for batch_size in batch_sizes
        for interval in (intervals if CARDS[method].has_intervals else [None])
    ]


@cache
def environment(device: str) -> dict[str, str]:
    """What else decides a number: code, versions, machine. A cell counts only where all agree."""
    return {
        "code": code_digest(),
        "funcprecond": fp.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device_name": device_name(device),
    }


def device_name(device: str) -> str:
    """Name of the accelerator, or of the processor as far as the system tells."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def code_digest() -> str:
    """Digest of the package's sources, less the presentation: results are those of one code."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not any(name == part or name.startswith(part + "/") for part in PRESENTATION):
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
