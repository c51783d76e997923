"""Training loss against steps and against seconds."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure as Canvas

from funcprecond.compare.report.style import styles
from funcprecond.compare.summary import Row


def first_of_plan(rows: Sequence[Row]) -> list[Row]:
    """Rows at the smallest batch size and interval of the plan, one a method.

    Plots with one line a method show these; `sensitivity` shows the others.
    """
    batch = min(row.setting.batch_size for row in rows)
    interval = min((row.setting.interval or 0 for row in rows if row.setting.interval), default=0)
    return [
        row
        for row in rows
        if row.setting.batch_size == batch and row.setting.interval in (None, interval)
    ]


def where(rows: Sequence[Row]) -> str:
    """Batch size and interval of `first_of_plan`, in words."""
    first = first_of_plan(rows)
    interval = next((row.setting.interval for row in first if row.setting.interval), None)
    words = f"batch size {first[0].setting.batch_size}"
    return words if interval is None else f"{words}, interval {interval}"


def mean_curve(row: Row) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean seconds, mean loss over seeds, and (2, points) least and greatest loss."""
    steps = np.array(row.runs[0]["curve"]["step"])
    seconds = np.mean([run["curve"]["seconds"] for run in row.runs], axis=0)
    loss = np.array([run["curve"]["loss"] for run in row.runs])
    return steps, seconds, loss.mean(0), np.stack([loss.min(0), loss.max(0)])


def curves(canvas: Canvas, rows: Sequence[Row]) -> str:
    """Two panels that share the loss axis; returns the caption, "" if no run ended well."""
    shown = [row for row in first_of_plan(rows) if row.runs]
    if not shown:
        return ""
    style = styles([row.setting.method for row in rows])
    canvas.set_size_inches(10.5, 4.6)
    by_steps, by_seconds = canvas.subplots(1, 2, sharey=True)
    ends = []
    for row in shown:
        steps, seconds, loss, span = mean_curve(row)
        look = style[row.setting.method]
        width = 2.2 if row.setting.method == "sgd" else 1.5
        for axes, x in ((by_steps, steps), (by_seconds, seconds)):
            (line,) = axes.plot(x, loss, lw=width, label=row.setting.method, **look)
        if len(shown) <= 6:  # more bands than that hide each other
            by_steps.fill_between(steps, *span, color=look["color"], alpha=0.10, lw=0)
        ends.append((loss[-1], line))
    by_steps.set(xlabel="steps", ylabel="training loss (nats)", yscale="log", title="by steps")
    by_seconds.set(xlabel="seconds spent in steps (log)", xscale="log", title="by seconds")
    # A loss of 1e-9 is as trained as one of 1e-5, and would flatten everything above it.
    by_steps.set_ylim(bottom=max(min(end for end, _ in ends) / 2, 1e-5))
    ends.sort(key=lambda end: -end[0])
    canvas.legend(handles=[line for _, line in ends], loc="outside right center", fontsize=8.5)
    band = ", the band reaches from the least to the greatest" if len(shown) <= 6 else ""
    return (
        f"Training loss at each method's best learning rate, {where(rows)}. Lines are means over "
        f"seeds{band}; the legend is in the order of the last loss, highest first. Seconds count "
        "the steps alone, not the evaluation."
    )
