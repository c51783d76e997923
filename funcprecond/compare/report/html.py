"""The report as one HTML page that needs no other file."""

import base64
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from funcprecond.compare import report
from funcprecond.compare.report.curves import first_of_plan, mean_curve
from funcprecond.compare.report.style import styles
from funcprecond.compare.report.table import HEADINGS, cells, plus_minus, reasons
from funcprecond.compare.summary import Row
from funcprecond.methods.card import CARDS


def page(rows: Sequence[Row], images: Sequence[tuple[Path, str]], about: dict[str, str]) -> str:
    """The report as HTML.

    Args:
        rows: the comparison, best first.
        images: pairs of a PNG file, which is embedded in the page, and its caption.
        about: the settings and the environment, as text.
    """
    template = Template(files(report).joinpath("page.html").read_text(encoding="utf-8"))
    task = rows[0].task
    return template.substitute(
        title=escape(task.title),
        lead=lead(rows),
        table=html_table(rows),
        reasons="".join(f"<li>{escape(line)}</li>" for line in [*reasons(rows), *said(rows)]),
        figures="".join(figure(path, caption) for path, caption in images),
        about="".join(
            f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in about.items()
        ),
    )


def lead(rows: Sequence[Row]) -> str:
    """The first sentences, which state the main result."""
    good = [row for row in rows if row.metric is not None]
    if not good:
        return "No method finished this task."
    task, first = rows[0].task, good[0]
    parts = [
        f"Best test {task.metric}: <strong>{escape(first.setting.method)}</strong> with "
        f"{in_words(first)}"
    ]
    sgd = next((row for row in good if row.setting.method == "sgd"), None)
    if sgd is not None and sgd is not first:
        parts.append(f", against {in_words(sgd)} for SGD with momentum")
    if first.cost.get("time_ratio") and first is not sgd:
        parts.append(f"; a step takes {first.cost['time_ratio']:.1f} times as long as one of SGD")
    missing = len(rows) - len(good)
    tail = (
        f" {missing} of {len(rows)} rows have no result, for the reasons below." if missing else ""
    )
    return "".join(parts) + "." + first_to_reach(good) + tail


def first_to_reach(rows: Sequence[Row]) -> str:
    """A sentence about which methods reach the final training loss of SGD first.

    Fewer steps do not mean fewer seconds, so that the sentence gives both.

    Args:
        rows: the rows that have a result.

    Returns:
        The sentence with a space in front, or "" if SGD is not among the rows.
    """
    found = {row.setting.method: mean_curve(row) for row in first_of_plan(rows) if row.runs}
    if "sgd" not in found or len(found) == 1:
        return ""
    steps, seconds, loss, _ = found["sgd"]
    target, whole = loss[-1], (steps[-1], seconds[-1])
    reached = {
        method: (curve[0][below[0]], curve[1][below[0]])
        for method, curve in found.items()
        if len(below := (curve[2] <= target).nonzero()[0])
    }
    by_steps, by_seconds = (min(reached, key=lambda m, i=i: reached[m][i]) for i in (0, 1))
    return (
        f" The final training loss of SGD ({target:.3g} nats after {whole[0]} steps and "
        f"{whole[1]:.2g} s) is reached in the fewest steps by <strong>{escape(by_steps)}</strong> "
        f"({reached[by_steps][0]} steps, {reached[by_steps][1]:.2g} s) and in the fewest seconds "
        f"by <strong>{escape(by_seconds)}</strong> ({reached[by_seconds][0]} steps, "
        f"{reached[by_seconds][1]:.2g} s)."
    )


def in_words(row: Row) -> str:
    """The metric of a row with its spread and the number of seeds, as text."""
    assert row.metric is not None
    factor, digits, sign = (100, 1, " %") if row.task.metric == "accuracy" else (1, 3, " nats")
    seeds = f" ({len(row.runs)} seeds)" if len(row.runs) > 1 else ""
    return f"{plus_minus(row.metric, factor, digits)}{sign}{seeds}"


def html_table(rows: Sequence[Row]) -> str:
    """The table, which shows the curvature, representation and solver of a method on hover."""
    style = styles([row.setting.method for row in rows])
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in HEADINGS)
    body = []
    for row in rows:
        method = row.setting.method
        card = CARDS[method]
        choices = f"{card.title}: {card.curvature} · {card.representation} · {card.solver}"
        mark = f'<i style="background:{style[method]["color"]}"></i>'
        first, *rest = cells(row)
        entries = "".join(f"<td>{escape(entry)}</td>" for entry in rest)
        kind = "sgd" if method == "sgd" else row.status
        body.append(
            f'<tr class="{kind}"><th scope="row" title="{escape(choices)}">'
            f"{mark}{escape(first)}</th>{entries}</tr>"
        )
    return f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"


def said(rows: Sequence[Row]) -> list[str]:
    """The warnings that the library issued during the runs."""
    return [f"{row.setting.label()} warning: {text}" for row in rows for text in row.warnings()]


def figure(path: Path, caption: str) -> str:
    """An embedded image with its caption."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
