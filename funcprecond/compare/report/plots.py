"""The plots of a report, drawn off screen."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

from funcprecond.compare.report.curves import curves
from funcprecond.compare.report.panels import cost, quality, rates
from funcprecond.compare.report.sensitivity import sensitivity
from funcprecond.compare.report.style import RULES
from funcprecond.compare.summary import Row


def figures(rows: Sequence[Row], folder: Path) -> list[tuple[Path, str]]:
    """Draw every plot that has something to show.

    Args:
        rows: the comparison, best first.
        folder: receives one PNG a plot.

    Returns:
        (file, caption) pairs in the order in which to read them.
    """
    drawn = []
    for name, draw in PLOTS.items():
        with mpl.rc_context(RULES):  # pyright: ignore[reportArgumentType]
            canvas = Canvas(layout="constrained")
            FigureCanvasAgg(canvas)
            caption = draw(canvas, rows)
            if caption:
                canvas.savefig(folder / f"{name}.png")
                drawn.append((folder / f"{name}.png", caption))
            else:
                (folder / f"{name}.png").unlink(missing_ok=True)  # of an earlier, larger plan
    return drawn


PLOTS: dict[str, Callable[[Canvas, Sequence[Row]], str]] = {
    "curves": curves,
    "quality": quality,
    "cost": cost,
    "rates": rates,
    "sensitivity": sensitivity,
}
