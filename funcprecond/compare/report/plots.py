"""The plots of a report, which are drawn without a display."""

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
    """Draw every plot that has data.

    Args:
        rows: the comparison, best first.
        folder: the folder for the PNG files.

    Returns:
        Pairs of a file and its caption, in the order of the report.
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
                # An earlier comparison with a larger plan may have drawn this plot.
                (folder / f"{name}.png").unlink(missing_ok=True)
    return drawn


PLOTS: dict[str, Callable[[Canvas, Sequence[Row]], str]] = {
    "curves": curves,
    "quality": quality,
    "cost": cost,
    "rates": rates,
    "sensitivity": sensitivity,
}
