"""The plots of the quality, the cost and the learning-rate sweep of each method."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, NullLocator

from funcprecond.compare.report.curves import first_of_plan, where
from funcprecond.compare.report.style import styles
from funcprecond.compare.summary import Row
from funcprecond.compare.sweep import validation_loss
from funcprecond.compare.tasks import Task


def unit(task: Task) -> tuple[str, float]:
    """The name of the metric of a task with its unit, and the factor that converts to this unit."""
    return ("accuracy (%)", 100.0) if task.metric == "accuracy" else ("loss (nats)", 1.0)


def quality(canvas: Canvas, rows: Sequence[Row]) -> str:
    """Draw the test metric of each method, and return the caption."""
    shown = [row for row in first_of_plan(rows) if row.metric is not None][::-1]
    if not shown:
        return ""
    name, factor = unit(shown[0].task)
    style = styles([row.setting.method for row in rows])
    canvas.set_size_inches(10.5, 0.9 + 0.29 * len(shown))
    axes = canvas.subplots()
    for height, row in enumerate(shown):
        color = style[row.setting.method]["color"]
        values = [factor * run["test"][row.task.metric] for run in row.runs]
        assert row.metric is not None
        mean, spread = factor * row.metric.mean, factor * (row.metric.spread or 0.0)
        axes.plot([mean - spread, mean + spread], [height] * 2, color=color, lw=5, alpha=0.22)
        axes.plot(values, [height] * len(values), "o", color=color, ms=4, alpha=0.6, mew=0)
        axes.plot(mean, height, "|", color=color, ms=13, mew=2.2)
        if row.setting.method == "sgd":
            axes.axvline(mean, color=color, lw=0.8, ls=":")
    axes.set_yticks(range(len(shown)), [row.setting.method for row in shown])
    axes.set(xlabel=f"test {name}", ylim=(-0.7, len(shown) - 0.3))
    axes.grid(axis="y", visible=False)
    return (
        f"Test {shown[0].task.metric} ({where(rows)}): one dot per seed, a bar at the mean, and "
        "shading of one standard deviation to each side. The dotted line is the mean of SGD."
    )


def ratio_axis(axes: Axes, which: str, values: Sequence[float]) -> None:
    """Make an axis logarithmic, with ticks at 1, 2, 5, 10 and so on.

    Args:
        axes: the axes of the plot.
        which: "x" or "y".
        values: the ratios that the plot shows.
    """
    low, high = min([*values, 1.0]), max([*values, 2.0])
    ticks = [m * 10.0**e for e in range(-2, 5) for m in (1, 2, 5)]
    shown = [tick for tick in ticks if low / 1.2 <= tick <= high * 1.4]
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low / 1.25, high * 1.45)})
    axis.set_ticks(shown, [f"{tick:g}×" for tick in shown])
    axis.set_minor_locator(NullLocator())


def cost(canvas: Canvas, rows: Sequence[Row]) -> str:
    """Draw the step time and the peak memory relative to SGD, and return the caption."""
    shown = [row for row in first_of_plan(rows) if row.cost.get("time_ratio")]
    if not shown:
        return ""
    shown.sort(key=lambda row: -row.cost["time_ratio"])
    style = styles([row.setting.method for row in rows])
    canvas.set_size_inches(10.5, 0.9 + 0.29 * len(shown))
    panels = canvas.subplots(1, 2, sharey=True)
    for axes, entry, label in (
        (panels[0], "time_ratio", "step time relative to SGD"),
        (panels[1], "memory_ratio", "peak memory relative to SGD"),
    ):
        values = [row.cost.get(entry) or math.nan for row in shown]
        ratio_axis(axes, "x", [value for value in values if value == value])
        for height, (row, value) in enumerate(zip(shown, values, strict=True)):
            color = style[row.setting.method]["color"]
            axes.plot([1, value], [height] * 2, color=color, lw=3, alpha=0.35)
            axes.plot(value, height, "o", color=color, ms=6)
            text = f"{value:.1f}×" if value == value else "not available on this device"
            at = value if value == value else 1.0
            axes.annotate(
                text, (at, height), (7, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.axvline(1, color="#1f2328", lw=0.8)
        axes.set(xlabel=label, ylim=(-0.7, len(shown) - 0.3))
        axes.grid(axis="y", visible=False)
    panels[0].set_yticks(range(len(shown)), [row.setting.method for row in shown])
    return (
        f"Cost of one step relative to SGD on the same batches ({where(rows)}). The time is the "
        "minimum over rounds in which the method and SGD take turns. The memory is the sum of what "
        "is kept between steps and the peak of what a step allocates in addition."
    )


def ended_well(row: Row) -> dict[float, float]:
    """The validation loss by learning rate, without the rates that diverged or failed."""
    losses = {rate: validation_loss(result) for _, rate, result in row.sweep}
    return {rate: loss for rate, loss in losses.items() if loss is not None}


def rates(canvas: Canvas, rows: Sequence[Row]) -> str:
    """Draw the validation loss by learning rate, and return the caption."""
    shown = [row for row in first_of_plan(rows) if len(row.sweep) > 1]
    if not shown:
        return ""
    style = styles([row.setting.method for row in rows])
    columns = min(5, len(shown))
    lines = -(-len(shown) // columns)
    canvas.set_size_inches(10.5, 0.5 + 1.75 * lines)
    grid = canvas.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for axes, row in zip(grid, shown, strict=False):
        color = style[row.setting.method]["color"]
        points = ended_well(row)
        axes.plot(list(points), list(points.values()), "o-", color=color, ms=4, lw=1.4)
        if row.learning_rate is not None:
            ring = {"ms": 9, "mfc": "white", "mew": 1.8, "clip_on": False, "zorder": 3}
            axes.plot(row.learning_rate, points[row.learning_rate], "o", color=color, **ring)
        for _, rate, result in row.sweep:
            if rate not in points:
                axes.axvline(rate, color="#dc2626", lw=1, ls=":")
                axes.annotate(
                    result["status"],
                    (rate, 0.04),
                    (-2, 0),
                    xycoords=("data", "axes fraction"),
                    textcoords="offset points",
                    rotation=90,
                    fontsize=7,
                    color="#dc2626",
                    ha="right",
                )
        tried = [rate for _, rate, _ in row.sweep]
        axes.set(
            xscale="log",
            yscale="log",
            title=row.setting.method,
            xlim=(tried[0] / 1.8, tried[-1] * 1.8),
        )
        axes.set_xticks(tried, [f"{rate:.2g}" for rate in tried], fontsize=7)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    canvas.supylabel("validation loss (nats)", fontsize=9, color="#374151")
    canvas.supxlabel("learning rate", fontsize=9, color="#374151")
    return (
        f"Learning-rate sweep with the first seed ({where(rows)}). The ring marks the rate that is "
        "chosen on the validation split and used for the other seeds."
    )
