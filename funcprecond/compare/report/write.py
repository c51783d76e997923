"""Writes `results.csv`, the plots and `index.html` beside `results.json`."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from funcprecond.compare.report.html import page
from funcprecond.compare.report.plots import figures
from funcprecond.compare.store import replace_file
from funcprecond.compare.summary import Row


def write(folder: Path, rows: Sequence[Row], about: dict[str, str]) -> list[Path]:
    """Write the report.

    Args:
        folder: where to; exists.
        rows: the comparison, best first.
        about: what was run on what, in words, for the page.

    Returns:
        the files written, the page last.
    """
    images = figures(rows, folder)
    sheet = folder / "results.csv"
    replace_file(sheet, to_csv(rows))
    index = folder / "index.html"
    replace_file(index, page(rows, images, about))
    return [sheet, *(path for path, _ in images), index]


def to_csv(rows: Sequence[Row]) -> str:
    """One line a row, under one line of names."""
    records = [row.record() for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
