"""TONGA: natural gradients from a discounted sum of outer products of gradients, of low rank."""

import torch
from torch import Tensor

from funcprecond.evidence import Evidence, is_due
from funcprecond.methods.card import card
from funcprecond.need import Every
from funcprecond.representation.gradient_window import GradientWindow
from funcprecond.solver.smw import SMW
from funcprecond.transform import Transform, counter, fitted
from funcprecond.tree import Params, state

__all__ = ["TONGAState", "tonga"]


@state
class TONGAState:
    """The state of TONGA.

    Attributes:
        window: the rows of X: k of the last truncation, and the gradients since then.
        age: the number of gradients since the last truncation.
    """

    window: GradientWindow
    age: Tensor


@card(
    "TONGA (Le Roux 2008)",
    curvature="F̂_emp^batch",
    representation="full, Gram",
    solver="G direct, SMW & eigendecomposition",
    learning_rate=0.1,
    options={"damping": 1e-2},
)
def tonga(
    *,
    damping: float | Tensor = 1e-2,
    decay: float | Tensor = 0.995,
    rank: int = 5,
    every: int = 50,
) -> Transform:
    """TONGA, topmoumoute online natural gradient (Le Roux, Manzagol & Bengio, NIPS 2007).

    C is a discounted sum over the gradients g_t of all P parameters jointly, kept as the rows of X,
    (k + B, P). Every B steps, its k largest eigenvalues are kept::

        C <- γ C + g gᵀ = Xᵀ X                  X <- [√γ X; g]
        d = (C + λ I)⁻¹ g = Xᵀ (X Xᵀ + λ I)⁻¹ e              e has a 1 in the row of g
        every B:  X Xᵀ = V diag(δ) Vᵀ,   X <- V_kᵀ X         for the k largest of δ

    Args:
        damping: λ, positive. C is a sum, so that λ is compared with about 1/(1 - γ) squared norms
            of gradients.
        decay: γ, the weight of the old matrix.
        rank: k, the number of eigenvalues that a truncation keeps.
        every: B, the number of steps between two truncations. Without evidence, each update
            truncates.

    Returns:
        A method that needs the gradient only. Its state is k + B copies of the parameters. A step
        takes two products with them and (k + B)³/3 operations; a truncation takes k (k + B) P
        operations and an eigendecomposition.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.chain(fp.tonga(damping=0.1), fp.scale(1e-2))
    """
    truncate, solver = Every("truncate", every), SMW(damping)

    def init(params: Params) -> TONGAState:
        return TONGAState(GradientWindow.init(params, rank + every), counter(params))

    def update(
        state: TONGAState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[TONGAState, Params]:
        rows, age = state.window, state.age
        if is_due(truncate, evidence):
            rows, age = rows.truncated(rank), torch.zeros_like(age)
        here = torch.arange(rank + every, device=age.device) == rank + age
        rows = rows.put(grads, rank + age, torch.where(here, 1.0, rows.weights * decay))
        y = here.to(rows.dots.dtype)
        return TONGAState(rows, age + 1), solver.push_through(solver.prepare(rows), y, grads)

    return fitted(Transform(init, update, truncate.marks), lambda state: state.window.covered)
