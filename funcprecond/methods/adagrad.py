"""AdaGrad, diagonal and full-matrix: the root of the sum of all gradients' outer products.

Rows: (F̂_emp^batch)^½; element, division; and full, dense, eigendecomposition. Duchi, Hazan &
Singer, JMLR 2011. With S (elementwise) and H = sum g gᵀ (a matrix for each parameter tensor)::

    d = g / (sqrt(S) + damping)              diagonal
    d = (H + epsilon λ_max(H) I)^(-1/2) g    full

Needs the gradient only. One copy of the parameters; (n, n) for each tensor of n entries and an
eigendecomposition at each refresh. The full matrix is the ideal that Shampoo and CASPR approximate.
"""

import torch
from torch import Tensor

from funcprecond.composition import compose
from funcprecond.curvature.gradient import BatchGradient
from funcprecond.methods.table import Card
from funcprecond.representation.average import Decay
from funcprecond.representation.dense import Dense
from funcprecond.representation.diagonal import Diagonal
from funcprecond.solver.divide import Divide
from funcprecond.solver.inverse_root import InverseRoot
from funcprecond.transform import Transform

__all__ = ["adagrad", "adagrad_full"]


def adagrad(*, damping: float | Tensor = 1e-10, decay: Decay = "sum") -> Transform:
    """Diagonal AdaGrad's direction.

    Args:
        damping: added to the root, as in ``torch.optim.Adagrad``.
        decay: "sum", or the weight of the old value of a bias-corrected moving average (RMSprop).
    """
    return compose(BatchGradient(), Diagonal, Divide(damping, power=0.5), decay=decay)


def adagrad_full(
    *,
    epsilon: float | Tensor = 1e-6,
    decay: Decay = "sum",
    every: int = 1,
    refresh_every: int = 1,
    start: int = 0,
    dtype: torch.dtype | None = None,
) -> Transform:
    """Full-matrix AdaGrad's direction, for tensors of at most 4096 entries.

    Args:
        epsilon: the ridge, relative to each matrix's largest eigenvalue.
        decay: "sum", or the weight of the old value of a moving average.
        every, refresh_every, start: the intervals, see :func:`funcprecond.composition`.
        dtype: what the decomposition runs in, see :mod:`funcprecond.linalg.inverse_roots`.
    """
    solver = InverseRoot(epsilon, dtype=dtype)
    return compose(
        BatchGradient(),
        Dense,
        solver,
        decay=decay,
        every=every,
        refresh_every=refresh_every,
        start=start,
    )


CARDS = (
    Card(
        "adagrad",
        "AdaGrad (Duchi 2011)",
        "(F̂_emp^batch)^½",
        "element",
        "G direct, division",
        adagrad,
        learning_rate=0.03,
    ),
    Card(
        "adagrad_full",
        "AdaGrad, full matrix (Duchi 2011)",
        "(F̂_emp^batch)^½",
        "full, dense",
        "G direct, eigendecomposition",
        adagrad_full,
        learning_rate=0.1,
        intervals=True,
    ),
)
