r"""The table of methods. The cards of the methods generate it; planned rows are listed here.

The curvature matrices C are: H, the Hessian; ``|H|``, the Hessian with absolute eigenvalues; G, the
Gauss-Newton matrix; F, the Fisher matrix; F̂_nmc, F estimated from n sampled labels; F̂_emp, F with
the labels of the data; F̂_emp^batch, the outer products of mini-batch gradients; Ĥ_bfgs, H estimated
from changes of the gradient.
"""

from funcprecond.methods.card import CARDS, Card

__all__ = ["PLANNED", "rows", "table"]

# The rows are in the order of the ASDL paper's table. A bare name stands for a method's own card.
_ROWS = r"""
lissa | LiSSA (Agarwal 2017) | H | full, dense | G iter, Neumann series
psgd | PSGD (Li 2018) | |H| | full, dense | G iter, triangular solve & SGD
neumann | Neumann optimizer (Krishnan 2017) | H | full, matrix-free | L iter, Neumann series
hessian_free
ksd | KSD (Vinyals & Povey 2011) | H, G | full, matrix-free | L iter, Krylov subspace
lbfgs
natural_gradient
smw_gn
smw_ng
engd
spring
sr
tonga
tonga_unit
mfac
ggt
fang | FANG (Grosse & Salakhutdinov 2015) | F̂_nmc | full, sparse | L/G direct, incomplete Cholesky
psgd_kron | ★ PSGD (KF) (Li 2018) | |H| | layer, KF-io | G iter, triangular solve & SGD
kbfgs | ★ K-BFGS (Goldfarb 2021) | Ĥ_bfgs | layer, KF-io | G iter, BFGS
kfac
adaptive_kfac
kflr
kfra | KFRA (Botev 2017) | G, by recursion | layer, KF-io | L/G direct, Cholesky & recursion
ekfac
skfac
layerwise_ng
seng
tnt
shampoo
caspr
one_sided_shampoo
unit_ng
diagonal_ng
adahessian
sfn | SFN (Dauphin 2014) | |H| | element; full, low-rank | L/G direct, division; L iter, Lanczos
esgd | Equilibrated SGD (Dauphin 2015) | |H| | element | L/G direct, division
adagrad
adagrad_full
adam
adamw
soap
splus
kl_shampoo
muon
sophia | Sophia (Liu 2023) | H, G | element | G direct, clipped division
foof
eva
eva_s
singd
nystrom_cg | Nyström-preconditioned CG (Rathore 2024) | H, G | full, low-rank | L iter, CG
sgd
"""


def rows() -> list[Card]:
    """The cards of all methods in the order of the table, with those that are planned."""
    found = []
    for line in _ROWS.strip().splitlines():
        name, *columns = (column.strip() for column in line.split(" | "))
        if name in CARDS:
            found.append(CARDS[name])
        else:
            title, curvature, representation, solver = columns
            starred = title.startswith("★ ")
            found.append(
                Card(
                    name,
                    title.removeprefix("★ "),
                    curvature,
                    representation,
                    solver,
                    starred=starred,
                )
            )
    listed = {card.name for card in found}
    return found + [card for card in CARDS.values() if card.name not in listed]


def table(*, works: bool | None = None) -> str:
    """The table of methods in Markdown.

    Args:
        works: True for the methods that work, False for the planned ones, None for all.

    Returns:
        Two header lines, and one line per method. The name of a method that works is in code type.
    """
    lines = [
        "| name | method | curvature C | representation | solver |",
        "|---|---|---|---|---|",
    ]
    for card in rows():
        if works in (None, card.build is not None):
            name = f"`{card.name}`" if card.build else card.name
            star = "★ " if card.starred else ""
            curvature = card.curvature.replace("|", r"\|")
            lines.append(
                f"| {name} | {star}{card.title} | {curvature} | {card.representation} | "
                f"{card.solver} |"
            )
    return "\n".join(lines)


PLANNED = tuple(line.split(" | ")[0] for line in _ROWS.strip().splitlines() if " | " in line)
"""The names of the methods that are planned."""
