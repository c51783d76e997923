"""The display of the progress: the current cell, the number of cells left, and the time left."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn


class Display:
    """A context manager that displays the progress of an engine, as its `Watcher`.

    It writes one line per finished cell, and on a terminal it also shows a progress bar.

    Args:
        console: the console to write to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = console.is_terminal
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not self.live,
        )
        self.bar_task = self.bar.add_task("starting", total=1.0, note="")
        self.began = time.perf_counter()
        self.cell_began = self.began
        self.left = 0
        self.seconds = self.expected = 0.0

    def __enter__(self) -> "Display":
        """Start the bar."""
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the bar."""
        self.bar.stop()

    def found(self, cells: int) -> None:
        """Print the number of cells that an earlier run has finished."""
        if cells:
            self.console.print(f"{cells} finished cells were found and are used.", highlight=False)

    def plan(self, left: int, seconds: float) -> None:
        """Set the numbers of cells and seconds left, including the next cell."""
        self.left, self.seconds = left, seconds

    def begin(self, label: str, expected: float) -> None:
        """Show the cell that starts."""
        self.expected, self.cell_began = expected, time.perf_counter()
        self.bar.update(self.bar_task, description=label, completed=0.0, note=self.note(0.0))

    def advance(self, fraction: float) -> None:
        """Move the bar of the current cell."""
        self.bar.update(self.bar_task, completed=fraction, note=self.note(fraction))

    def end(self, label: str, result: dict[str, Any]) -> None:
        """Print the result of a finished cell."""
        took = time.perf_counter() - self.cell_began
        left = "" if self.live else f"  [{self.note(1.0)}]"
        self.console.print(
            f"{label}: {outcome(result)} ({took:.1f} s){left}",
            style="red" if result["status"] == "failed" else "",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    def note(self, fraction: float) -> str:
        """The number of cells left, and their approximate time, as text."""
        left = self.left - (fraction == 1.0)
        cells = f"{left} {'cell' if left == 1 else 'cells'} left"
        if not self.seconds:
            return cells
        return f"{cells}, about {duration(self.seconds - fraction * self.expected)}"


def outcome(result: dict[str, Any]) -> str:
    """The result of a cell in a few words."""
    if result["status"] != "ok":
        return f"{result['status']}: {result['why']}"
    if "step_ms" in result:
        memory = result["memory_ratio"]
        return f"step {result['step_ms']:.2f} ms, {result['time_ratio']:.1f}× SGD's" + (
            f", memory {memory:.1f}×" if memory else ""
        )
    test = result["test"]
    return f"test accuracy {100 * test['accuracy']:.1f} %, loss {test['loss']:.3f}"


def duration(seconds: float) -> str:
    """A time as text: in seconds below two minutes, in minutes below two hours, else in hours."""
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
