"""The result table on the terminal."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from funcprecond.compare.summary import Figure, Row


def plus_minus(figure: Figure | None, factor: float = 1.0, digits: int = 3) -> str:
    """The mean ± spread of a figure times a factor; a dash if there is no figure.

    The figure of a single seed has no spread.
    """
    if figure is None:
        return "–"
    if figure.spread is None:
        return f"{factor * figure.mean:.{digits}f}"
    return f"{factor * figure.mean:.{digits}f} ± {factor * figure.spread:.{digits}f}"


def times(ratio: float | None) -> str:
    """A ratio to SGD; a dash if there is none."""
    if ratio is None:
        return "–"
    return (
        f"{ratio:.0f}×" if ratio >= 99.5 else f"{ratio:.1f}×" if ratio >= 9.95 else f"{ratio:.2f}×"
    )


HEADINGS = (
    "method",
    "batch",
    "interval",
    "learning rate",
    "test accuracy %",
    "test loss",
    "training loss",
    "step ms",
    "time / SGD",
    "memory / SGD",
)


def cells(row: Row) -> list[str]:
    """The entries of a row, in the order of `HEADINGS`."""
    step = row.cost.get("step_ms")
    return [
        row.setting.method,
        str(row.setting.batch_size),
        "–" if row.setting.interval is None else str(row.setting.interval),
        "–" if row.learning_rate is None else f"{row.learning_rate:g}",
        plus_minus(row.accuracy, 100, 1),
        plus_minus(row.loss),
        "–" if row.train_loss is None else f"{row.train_loss.mean:.3g}",
        "–" if step is None else f"{step:.2f}",
        times(row.cost.get("time_ratio")),
        times(row.cost.get("memory_ratio")),
    ]


def table(rows: Sequence[Row], title: str, width: int = 160) -> Table:
    """The table of all rows, with the reasons for failures below it.

    Args:
        rows: the rows in the order of `summary.rows`.
        title: the title of the table. The batch size and the interval are added to it if all rows
            have the same.
        width: the number of characters per line of the terminal. A table narrower than 100
            characters has no column for the training loss.
    """
    lines = [cells(row) for row in rows]
    shared = {
        heading: values.pop()
        for heading, *column in zip(HEADINGS, *lines, strict=True)
        if heading in ("batch", "interval") and len(values := set(column) - {"–"}) == 1
    }
    hidden = {*shared, "training loss"} if width < 100 else set(shared)
    words = [title, *(f"{heading} {value}" for heading, value in shared.items())]
    shown = Table(
        title=", ".join(words),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1) if width >= 100 else (0, 1, 0, 0),
    )
    kept = [number for number, heading in enumerate(HEADINGS) if heading not in hidden]
    for number in kept:
        longest = max(len(line[number]) for line in lines)  # only headings may be wrapped
        shown.add_column(HEADINGS[number], justify="right" if number else "left", min_width=longest)
    for row, line in zip(rows, lines, strict=True):
        style = "" if row.status == "ok" else "dim"
        entries = [line[number] for number in kept]
        shown.add_row(*entries, style="bold" if row.setting.method == "sgd" else style)
    shown.caption = "\n".join(reasons(rows)) or None
    return shown


def reasons(rows: Sequence[Row]) -> list[str]:
    """One line per row that failed, or that failed for some seeds."""
    return [f"{row.setting.label()} {row.status}: {row.why}" for row in rows if row.why]
