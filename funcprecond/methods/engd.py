"""Energy natural gradient: Newton's method in function space, for residuals of any kind."""

from typing import Literal

import torch
from torch import Tensor

from funcprecond.checks import one_of
from funcprecond.curvature.objective import Objective
from funcprecond.curvature.residual_rows import ResidualRows
from funcprecond.evidence import Evidence, required
from funcprecond.linalg import treemath
from funcprecond.methods.card import card
from funcprecond.representation.gram import Gram
from funcprecond.solver.least_squares import LeastSquares
from funcprecond.transform import Transform, check_present
from funcprecond.tree import Params, state

__all__ = ["ENGDState", "engd"]

# The lengths that the grid search tries: 1, 1/2, 1/4, ..., 2^-30.
HALVINGS = 31
# What the damping is multiplied by after a step that lowers the loss, and after one that does not.
DOWN, UP = 1 / 3, 4.0
LEAST, MOST = 1e-12, 1e12


@state
class ENGDState:
    """The damping λ, a 0-d tensor."""

    damping: Tensor


@card(
    "ENGD (Müller & Zeinhofer 2023)",
    curvature="G",
    representation="full, Gram",
    solver="L direct, SMW or Cholesky inverse",
    learning_rate=1.0,
    carries_momentum=True,
    options={"damping": 1.0, "search": "none"},
)
def engd(
    *,
    damping: float | Tensor = 1e-3,
    search: Literal["damping", "grid", "none"] = "damping",
) -> Transform:
    """Energy natural gradient descent (Müller & Zeinhofer, ICML 2023, arXiv 2302.13163).

    The Hessian of the energy ``E(u)`` in the space of functions u, pulled back to the parameters of
    a network, is ``∫∫ D²E(u) (∂_i u, ∂_j u)``. For half the sum of squares of N residuals r with
    the Jacobian J, (N, P), it is the Gauss-Newton matrix ``JᵀJ``, and::

        N < P:   d = Jᵀ (J Jᵀ + λ I)⁻¹ r
        N >= P:  d = (Jᵀ J + λ I)⁻¹ Jᵀ r                                      the same vector
        "damping":  d if L(θ - d) < L(θ), then λ <- λ / 3;  otherwise 0, and λ <- 4 λ
        "grid":     η d with the η of 1, 1/2, ..., 2^-30 with the least L(θ - η d), or 0

    It solves ``min_d ‖J d - r‖² + λ ‖d‖²``, and is also known as Gauss-Newton's method. All losses
    are those of the same batch. For a loss of another kind, such as the cross-entropy, ``JᵀJ``
    stands for its Gauss-Newton matrix.

    Args:
        damping: λ, positive, in units of the loss; the initial value with "damping". The paper has
            none, for which "grid" and a small value, such as 1e-8, stand here.
        search: how the length is chosen: "damping" (the Levenberg-Marquardt rule), "grid" (the
            paper's line search), or "none" for d itself, to be multiplied by a learning rate.

    Returns:
        A method whose learning rate is 1, made for the problems of :func:`residuals`, in float64.
        It costs a gradient for each residual, ``N P min(N, P)`` operations for the matrix,
        ``min(N, P)³ / 3`` for the solve, and one loss with "damping" or 31 with "grid", under
        ``vmap``. The state is λ.

    Raises:
        ValueError: an option is out of range. ``fp.observe`` raises it where a BatchNorm in
            training mode couples the examples.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.engd()    # no fp.scale: the method chooses the length
    """
    one_of(("damping", "grid", "none"), search=search)
    need, objective = ResidualRows(), Objective()

    def update(
        state: ENGDState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[ENGDState, Params]:
        evidence = required(evidence, need)
        check_present(grads)
        measured, solver = evidence[need], LeastSquares(state.damping)
        factor = solver.prepare(Gram.from_layers(measured.layers, grads), grads)
        direction = solver.step(factor, measured, grads, evidence.is_own(grads))
        if search == "none":
            return state, direction
        loss_after = evidence[objective].loss_after
        if search == "grid":
            lengths = 0.5 ** torch.arange(HALVINGS).to(evidence.loss)
            losses = torch.vmap(lambda x: loss_after(treemath.mul(direction, -x)))(lengths)
            losses = losses.nan_to_num(torch.inf)
            best = losses.min()
            # The longest of several that are equally good.
            longest = torch.where(losses == best, lengths, 0.0).amax()
            length = torch.where(best < evidence.loss, longest, 0.0)
            return state, _scaled(direction, length)
        fell = loss_after(treemath.mul(direction, -1.0)) < evidence.loss
        lam = torch.where(fell, state.damping * DOWN, state.damping * UP).clamp(LEAST, MOST)
        return ENGDState(lam), treemath.where(fell, direction, 0.0)

    return Transform(
        lambda params: ENGDState(treemath.scalar_like(params, damping)),
        update,
        lambda t: (need,) if search == "none" else (need, objective),
    )


def _scaled(direction: Params, length: Tensor) -> Params:
    """``length * direction``, and zero where the length is zero and the direction is not finite."""
    return {k: torch.where(length > 0, length.to(d.dtype) * d, 0.0) for k, d in direction.items()}
