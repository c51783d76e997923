"""M-FAC: the inverse of a full matrix of the last m gradients, without ever forming it."""

import torch
from torch import Tensor

from funcprecond.methods.card import card
from funcprecond.representation.gradient_window import GradientWindow
from funcprecond.solver.smw import SMW
from funcprecond.transform import Transform, counter, fitted, gradient_only
from funcprecond.tree import Params, state

__all__ = ["MFACState", "mfac"]


@state
class MFACState:
    """The state of M-FAC.

    Attributes:
        window: the last m gradients, with the weight 1/m each. Row t mod m has the gradient of
            update t, counted from 0.
        step: the number of updates.
    """

    window: GradientWindow
    step: Tensor


@card(
    "M-FAC (Frantar 2021)",
    curvature="F̂_emp^batch",
    representation="full, Gram",
    solver="G direct, SMW solve",
    learning_rate=3e-3,
    options={"window": 32, "damping": 1e-2},
)
def mfac(*, window: int = 512, damping: float | Tensor = 1e-5) -> Transform:
    """M-FAC, matrix-free approximate curvature (Frantar, Kurtic & Alistarh, arXiv 2107.03356).

    The rows of G, (m, P), are the last m mini-batch gradients g_i of all P parameters jointly, and
    g is the newest of them::

        F = λ I + Gᵀ G / m                                       (P, P), never formed
        d = F⁻¹ g = m Gᵀ (m λ I + G Gᵀ)⁻¹ e                      e has a 1 in the row of g

    This is the product that both algorithms of the paper compute. The static one is a recursion
    over the gradients, ``v_i = g_i/λ - Σ_{j<i} v_j (v_jᵀ g_i) / (m + g_jᵀ v_j)``, and the dynamic
    one runs it on the entries of G Gᵀ. A Cholesky factor of the (m, m) matrix takes fewer
    operations and loses fewer digits, and since g is a row of G, nothing is divided by λ.

    Args:
        window: m, the number of gradients; the paper uses 512 and 1024.
        damping: λ, positive. The matrix is divided by m also while fewer gradients have been seen.

    Returns:
        A method that needs the gradient only. Its state is m copies of the parameters, which limits
        its use: take ``fp.partition`` for a window for each part. A step takes two products with
        them, a copy of them, and m³/3 operations.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.chain(fp.mfac(window=32, damping=1e-2), fp.scale(1e-2))
    """
    solver = SMW(damping)

    def init(params: Params) -> MFACState:
        return MFACState(GradientWindow.init(params, window, 1 / window), counter(params))

    def update(state: MFACState, grads: Params) -> tuple[MFACState, Params]:
        newest = state.step % window
        rows = state.window.put(grads, newest, state.window.weights)
        # g is the row of U = G/√m of its place, times √m.
        here = torch.arange(window, device=newest.device) == newest
        y = here.to(rows.dots.dtype) * rows.weights.rsqrt()
        direction = solver.push_through(solver.prepare(rows), y, grads)
        return MFACState(rows, state.step + 1), direction

    return fitted(gradient_only(init, update), lambda state: state.window.covered)
