"""The readable table at the end."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from funcprecond.compare.summary import Figure, Row


def plus_minus(figure: Figure | None, factor: float = 1.0, digits: int = 3) -> str:
    """Mean ± spread, times a factor; a dash for none."""
    if figure is None:
        return "–"
    return f"{factor * figure.mean:.{digits}f} ± {factor * figure.spread:.{digits}f}"


def times(ratio: float | None) -> str:
    """A ratio to SGD; a dash for none."""
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
    """A row's entries under `HEADINGS`."""
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
    """All rows, best first; those without a figure are explained in words below.

    Args:
        rows: as `summary.rows` sorts them.
        title: above the table; batch size and interval are added to it where all rows share them.
        width: characters in a line of the terminal; a narrow one does without the training loss.
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
        longest = max(len(line[number]) for line in lines)  # headings may be folded, figures not
        shown.add_column(HEADINGS[number], justify="right" if number else "left", min_width=longest)
    for row, line in zip(rows, lines, strict=True):
        style = "" if row.status == "ok" else "dim"
        entries = [line[number] for number in kept]
        shown.add_row(*entries, style="bold" if row.setting.method == "sgd" else style)
    shown.caption = "\n".join(reasons(rows)) or None
    return shown


def reasons(rows: Sequence[Row]) -> list[str]:
    """A line for each row that did not end well, or not for every seed."""
    return [f"{row.setting.label()} {row.status}: {row.why}" for row in rows if row.why]
