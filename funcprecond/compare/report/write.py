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
        folder: the folder for the files, which must exist.
        rows: the comparison, best first.
        about: the settings and the environment, as text for the page.

    Returns:
        The files that were written; the page comes last.
    """
    images = figures(rows, folder)
    sheet = folder / "results.csv"
    replace_file(sheet, to_csv(rows))
    index = folder / "index.html"
    replace_file(index, page(rows, images, about))
    return [sheet, *(path for path, _ in images), index]


def to_csv(rows: Sequence[Row]) -> str:
    """The rows in CSV format, with a header."""
    records = [row.record() for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
