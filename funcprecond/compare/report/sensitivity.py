"""The plot of quality and cost by batch size and by interval."""

from collections.abc import Sequence

from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import NullLocator

from funcprecond.compare.report.panels import ratio_axis, unit
from funcprecond.compare.report.style import styles
from funcprecond.compare.summary import Row


def sensitivity(canvas: Canvas, rows: Sequence[Row]) -> str:
    """Draw one column for the batch sizes and one for the intervals, if the plan has several.

    The column of the batch sizes shows the smallest interval, and that of the intervals the
    smallest batch size.

    Returns:
        The caption; "" if there is no column, or if all runs failed.
    """
    good = [row for row in rows if row.metric is not None]
    batch_sizes = sorted({row.setting.batch_size for row in rows})
    intervals = sorted({row.setting.interval for row in rows if row.setting.interval})
    columns: list[tuple[str, list[int], list[Row]]] = []
    if len(batch_sizes) > 1:
        first = [
            row for row in good if row.setting.interval in (None, min(intervals, default=None))
        ]
        columns.append(("batch size", batch_sizes, first))
    if len(intervals) > 1:
        first = [row for row in good if row.setting.batch_size == batch_sizes[0]]
        columns.append(("interval", intervals, first))
    if not columns or not good:
        return ""
    task = rows[0].task
    name, factor = unit(task)
    style = styles([row.setting.method for row in rows])
    canvas.set_size_inches(4.6 * len(columns) + 1.4, 6.2)
    grid = canvas.subplots(2, len(columns), squeeze=False, sharex="col", sharey="row")
    lines = {}
    for column, (label, ticks, shown) in enumerate(columns):
        above, below = grid[0, column], grid[1, column]
        for method, look in style.items():
            points = [
                (at, factor * row.metric.mean, row.cost["time_ratio"])
                for row in shown
                if row.setting.method == method and row.metric is not None
                # A method without intervals has the same cost at each of them.
                for at in positions(row, label, ticks)
            ]
            if not points:
                continue
            x, quality, time = zip(*sorted(points), strict=True)
            marker = {"marker": "o", "ms": 4, "lw": 1.4}
            (lines[method],) = above.plot(x, quality, label=method, **marker, **look)
            below.plot(x, time, **marker, **look)
        below.set(xscale="log", xlabel=label)
        below.set_xticks(ticks, [str(tick) for tick in ticks])
        below.xaxis.set_minor_locator(NullLocator())
    ratio_axis(grid[1, 0], "y", [row.cost["time_ratio"] for *_, shown in columns for row in shown])
    grid[0, 0].set_ylabel(f"test {name}")
    grid[1, 0].set_ylabel("step time relative to SGD")
    canvas.legend(handles=list(lines.values()), loc="outside right center", fontsize=8.5)
    return (
        f"Sensitivity to batch size and interval, with each point at its best learning rate. Top: "
        f"test {task.metric}. Bottom: step time relative to SGD at the same batch size."
    )


def positions(row: Row, label: str, ticks: Sequence[int]) -> Sequence[int]:
    """The positions of a row on the horizontal axis."""
    if label == "batch size":
        return [row.setting.batch_size]
    return ticks if row.setting.interval is None else [row.setting.interval]
