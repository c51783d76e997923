"""TONGA by units: a matrix of low rank for the weights into each output unit of a layer."""

import torch
from torch import Tensor

from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.evidence import Evidence, is_due, required
from funcprecond.methods.card import card
from funcprecond.need import Every, Need
from funcprecond.representation.unit_window import UnitWindow
from funcprecond.solver.smw import SMW
from funcprecond.transform import Transform, counter, fitted
from funcprecond.tree import Params, state

__all__ = ["TONGAUnitState", "tonga_unit"]


@state
class TONGAUnitState:
    """The state of TONGA by units.

    Attributes:
        window: the rows of X of each unit: k of the last truncation, and the gradients since then.
        age: the number of gradients since the last truncation.
    """

    window: UnitWindow
    age: Tensor


@card(
    "TONGA, unit (Le Roux 2008)",
    curvature="F̂_emp^batch",
    representation="unit, Gram",
    solver="G direct, SMW & eigendecomposition",
    learning_rate=0.01,
    options={"damping": 1e-2},
)
def tonga_unit(
    *,
    damping: float | Tensor = 1e-2,
    decay: float | Tensor = 0.995,
    rank: int = 5,
    every: int = 50,
) -> Transform:
    """TONGA with a matrix for each unit (Le Roux, Manzagol & Bengio, NIPS 2007).

    The matrix of :func:`funcprecond.tonga` without the blocks of two different units. g_o is the
    gradient in the D weights into the output unit o of a layer and its bias, a row of
    ``[∇W | ∇b]``, and the rows of X_o, (k + B, D), are those of several steps::

        X_o <- [√γ X_o; g_o]
        d_o = (X_oᵀ X_o + λ I)⁻¹ g_o = X_oᵀ (X_o X_oᵀ + λ I)⁻¹ e       e has a 1 in the row of g_o
        every B:  X_o X_oᵀ = V diag(δ) Vᵀ,   X_o <- V_kᵀ X_o           for the k largest of δ

    Args:
        damping, decay, rank, every: λ, γ, k and B, see :func:`funcprecond.tonga`.

    Returns:
        A method that needs to know the layers. A unit is an output of a linear layer, a channel of
        a convolution, a coordinate of an embedding or of a norm layer; a parameter outside of
        layers is one unit. The state is k + B copies of the parameters and (k + B)² numbers for
        each unit. A step takes two products with the rows and (k + B)³/3 operations for each unit.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.chain(fp.tonga_unit(damping=0.1), fp.scale(1e-2))
    """
    curvature = LayerStatistics("empirical", others="none")
    truncate, solver, count = Every("truncate", every), SMW(damping), rank + every

    def init(params: Params) -> TONGAUnitState:
        return TONGAUnitState(UnitWindow.init(params, count), counter(params))

    def update(
        state: TONGAUnitState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[TONGAUnitState, Params]:
        evidence = required(evidence, curvature)
        window, age = state.window, state.age
        if is_due(truncate, evidence, curvature):
            window, age = window.truncated(rank), torch.zeros_like(age)
        here = torch.arange(count, device=age.device) == rank + age
        weights = torch.where(here, 1.0, window.weights * decay)
        window, blocks = window.put(grads, evidence[curvature], here, weights)
        direction = dict(grads)
        for rows in blocks:
            y = here.to(weights.dtype).expand(len(rows.dots), count)
            own = {k: grads[k] for k in rows.units.own}
            direction |= solver.push_through(solver.prepare(rows), y, own)
        return TONGAUnitState(window, age + 1), direction

    def needs(t: int) -> tuple[Need, ...]:
        return (curvature, *truncate.marks(t))

    return fitted(Transform(init, update, needs), lambda state: state.window.covered)
