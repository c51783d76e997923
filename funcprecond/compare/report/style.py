"""The colors of the methods: methods with similar representations have shades of one hue."""

from collections.abc import Sequence

from funcprecond.methods.card import CARDS

# The first name that occurs in the representation of a method determines its hue.
HUES = (
    ("identity", ("#1f2328",)),
    ("KF-io", ("#c2410c", "#f59e0b", "#7c2d12", "#fbbf24")),
    ("KF-dim", ("#7e22ce", "#d946ef", "#4c1d95", "#f0abfc")),
    ("unit", ("#9f1239", "#fb7185")),
    ("element", ("#1d4ed8", "#0891b2", "#60a5fa", "#0c4a6e", "#38bdf8", "#1e3a8a")),
    ("full", ("#15803d", "#65a30d", "#10b981", "#365314", "#84cc16", "#064e3b")),
)
OTHER = ("#57534e", "#a8a29e", "#292524")
DASHES = ("-", "--", ":", "-.")

RULES = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": "#374151",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.7,
    "xtick.color": "#6b7280",
    "ytick.color": "#6b7280",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.dpi": 170,
}


def styles(methods: Sequence[str]) -> dict[str, dict[str, str]]:
    """The color and the line style of each method, which are the same in every plot of a report.

    Args:
        methods: names in `CARDS`. The shades depend on their order in `CARDS`, not on this one.
    """
    chosen: dict[str, dict[str, str]] = {}
    used: dict[str, int] = {}
    for method in [name for name in CARDS if name in methods]:
        hue, shades = next(
            (hue for hue in HUES if hue[0] in CARDS[method].representation), ("", OTHER)
        )
        number = used.get(hue, 0)
        used[hue] = number + 1
        chosen[method] = {
            "color": shades[number % len(shades)],
            "linestyle": DASHES[number // len(shades) % len(DASHES)],
        }
    return chosen
