"""The plot of the training loss by steps and by seconds."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure as Canvas

from funcprecond.compare.report.style import styles
from funcprecond.compare.summary import Row


def first_of_plan(rows: Sequence[Row]) -> list[Row]:
    """The rows at the smallest batch size and interval of the plan, one per method.

    Plots with one line per method show these rows. The plot of `sensitivity` shows all of them.
    """
    batch = min(row.setting.batch_size for row in rows)
    interval = min((row.setting.interval or 0 for row in rows if row.setting.interval), default=0)
    return [
        row
        for row in rows
        if row.setting.batch_size == batch and row.setting.interval in (None, interval)
    ]


def where(rows: Sequence[Row]) -> str:
    """The batch size and the interval of `first_of_plan`, as text."""
    first = first_of_plan(rows)
    interval = next((row.setting.interval for row in first if row.setting.interval), None)
    words = f"batch size {first[0].setting.batch_size}"
    return words if interval is None else f"{words}, interval {interval}"


def mean_curve(row: Row) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The training curve of a row.

    Returns:
        The steps; the mean of the seconds and the mean of the loss over the seeds; and the smallest
        and the largest loss, (2, points).
    """
    steps = np.array(row.runs[0]["curve"]["step"])
    seconds = np.mean([run["curve"]["seconds"] for run in row.runs], axis=0)
    loss = np.array([run["curve"]["loss"] for run in row.runs])
    return steps, seconds, loss.mean(0), np.stack([loss.min(0), loss.max(0)])


def curves(canvas: Canvas, rows: Sequence[Row]) -> str:
    """Draw the training loss in two panels, by steps and by seconds.

    Returns:
        The caption; "" if all runs failed.
    """
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
        if len(shown) <= 6:  # more than six bands would cover each other
            by_steps.fill_between(steps, *span, color=look["color"], alpha=0.10, lw=0)
        ends.append((loss[-1], line))
    by_steps.set(xlabel="steps", ylabel="training loss (nats)", yscale="log", title="by steps")
    by_seconds.set(xlabel="seconds spent in steps (log)", xscale="log", title="by seconds")
    # The axis ends at 1e-5, because a smaller loss shows nothing more and would compress the rest.
    by_steps.set_ylim(bottom=max(min(end for end, _ in ends) / 2, 1e-5))
    ends.sort(key=lambda end: -end[0])
    canvas.legend(handles=[line for _, line in ends], loc="outside right center", fontsize=8.5)
    band = ", and the bands reach from the smallest to the largest" if len(shown) <= 6 else ""
    return (
        f"Training loss at the best learning rate of each method ({where(rows)}). The lines are "
        f"means over the seeds{band}. The legend is ordered by the final loss, highest first. The "
        "seconds include the steps only, not the evaluation."
    )
