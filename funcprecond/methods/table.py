"""The table of methods, generated from the method files.

Every file of :mod:`funcprecond.methods` says in a :class:`Card` which row it is: the curvature
matrix, its representation and the solver. Rows that have no file yet stand here, so that the table
is whole.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from funcprecond.transform import Transform

__all__ = ["CARDS", "Card", "table"]


@dataclasses.dataclass(frozen=True)
class Card:
    """One row of the table.

    Attributes:
        name: what users write, the builder's name.
        title: the method, with authors and year.
        curvature: which matrix C.
        representation: how it is stored.
        solver: how ``P g`` is computed; L local, G global.
        build: the builder, with keyword-only hyperparameters.
        learning_rate: a sensible scale for this method's direction.
        intervals: whether the builder takes ``every`` and ``refresh_every``.
        momentum: whether the direction already carries momentum.
        options: hyperparameters for small problems, where the defaults are for large ones.
        starred: analysed in ASDL's case studies.
    """

    name: str
    title: str
    curvature: str
    representation: str
    solver: str
    build: Callable[..., Transform] | None = None
    learning_rate: float = 0.1
    intervals: bool = False
    momentum: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    starred: bool = False


# The rows in the order of the literature's table: a bare name is a method file's own row, the
# others have no file yet.
_ROWS = r"""
lissa | LiSSA (Agarwal 2017) | H | full, dense | G iter, Neumann series
psgd | PSGD (Li 2018) | \|H\| | full, dense | G iter, triangular solve & SGD
neumann | Neumann optimizer (Krishnan 2017) | H | full, matrix-free | L iter, Neumann series
hessian_free
ksd | KSD (Vinyals & Povey 2011) | H, G | full, matrix-free | L iter, Krylov subspace
lbfgs
smw_gn | SMW-GN (Ren & Goldfarb 2019) | G | full, Gram | L direct, SMW inverse
smw_ng
tonga | TONGA (Le Roux 2008) | F̂_emp | full or unit, Gram | G direct, SMW & eigendecomposition
mfac | M-FAC (Frantar 2021) | F̂_emp^batch | full, Gram | G direct, SMW solve
ggt
fang | FANG (Grosse & Salakhutdinov 2015) | F̂_nmc | full, sparse | L/G direct, incomplete Cholesky
psgd_kron | ★ PSGD (KF) (Li 2018) | \|H\| | layer, KF-io | G iter, triangular solve & SGD
kbfgs | ★ K-BFGS (Goldfarb 2021) | Ĥ_bfgs | layer, KF-io | G iter, BFGS
kfac
adaptive_kfac
kflr
kfra | KFRA (Botev 2017) | G, by recursion | layer, KF-io | L/G direct, Cholesky & recursion
ekfac
skfac | SKFAC (Tang 2021) | F̂_nmc, F̂_emp | layer, KF-io, rank reduced | L direct, SMW inverse
seng | ★ SENG (Yang 2021) | F̂_emp | layer, Gram | L/G direct, SMW inverse & sketching
tnt
shampoo
caspr
one_sided_shampoo
unit_ng | Unit-wise NG (Ollivier 2015) | F̂_nmc, F̂_emp | unit, dense | L/G direct, Cholesky inverse
adahessian
sfn | SFN (Dauphin 2014) | \|H\| | element; full, low-rank | L/G direct, division; L iter, Lanczos
esgd | Equilibrated SGD (Dauphin 2015) | \|H\| | element | L/G direct, division
adagrad
adagrad_full
adam
adamw
soap
splus
kl_shampoo
muon
sophia | Sophia (Liu 2023) | H, G | element | G direct, clipped division
foof | FOOF (Benzing 2022) | input covariance | layer, KF-io | L/G direct, Cholesky inverse
eva | Eva (Zhang 2023) | F̂_emp | layer, rank-one KF-io | G direct, Sherman-Morrison
singd | SINGD (Lin 2024) | F̂_emp | layer, KF-io of the inverse | G iter, products only
nystrom_cg | Nyström-preconditioned CG (Rathore 2024) | H, G | full, low-rank | L iter, CG
sgd
"""


@cache
def _cards() -> dict[str, Card]:
    package = importlib.import_module("funcprecond.methods")
    found: dict[str, Card] = {}
    for module in pkgutil.iter_modules(package.__path__):
        if module.name == "table":
            continue
        for card in getattr(
            importlib.import_module(f"{package.__name__}.{module.name}"), "CARDS", ()
        ):
            found[card.name] = card
    return found


class _Cards(Mapping[str, Card]):
    """The cards of all method files, by name, read when first asked for."""

    def __getitem__(self, name: str) -> Card:
        return _cards()[name]

    def __iter__(self):
        return iter(_cards())

    def __len__(self) -> int:
        return len(_cards())


CARDS: Mapping[str, Card] = _Cards()


def table() -> str:
    """The whole table in Markdown: what works today has its name in code type and a check mark."""
    lines = [
        "| | name | method | curvature C | representation | solver |",
        "|---|---|---|---|---|---|",
    ]
    for card in _rows():
        mark, name = ("✓", f"`{card.name}`") if card.build else ("", card.name)
        star = "★ " if card.starred else ""
        lines.append(
            f"| {mark} | {name} | {star}{card.title} | {card.curvature} | {card.representation} | "
            f"{card.solver} |"
        )
    return "\n".join(lines)


def _rows() -> list[Card]:
    rows = []
    for line in _ROWS.strip().splitlines():
        name, *columns = (column.strip() for column in line.split(" | "))
        if name in CARDS:
            rows.append(CARDS[name])
        else:
            title, curvature, representation, solver = columns
            rows.append(Card(name, title, curvature, representation, solver))
    listed = {card.name for card in rows}
    return rows + [card for card in CARDS.values() if card.name not in listed]
