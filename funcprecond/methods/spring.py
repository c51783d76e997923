"""SPRING: a natural gradient that keeps what this batch cannot see of the last direction."""

from torch import Tensor

from funcprecond.curvature.residual_rows import ResidualRows
from funcprecond.evidence import Evidence, required
from funcprecond.linalg import treemath
from funcprecond.methods.card import card
from funcprecond.representation.gram import Gram
from funcprecond.solver.least_squares import LeastSquares
from funcprecond.transform import Transform, fitted
from funcprecond.tree import Params, state

__all__ = ["SPRINGState", "spring"]


@state
class SPRINGState:
    """The last direction φ, shaped like the parameters, in float32 or wider."""

    direction: Params


@card(
    "SPRING (Goldshlager 2024)",
    curvature="G; F/4 of a density",
    representation="full, Gram",
    solver="L direct, SMW or Cholesky inverse, momentum",
    learning_rate=0.3,
    carries_momentum=True,
    options={"damping": 1.0},
)
def spring(*, damping: float | Tensor = 1e-3, decay: float | Tensor = 0.9) -> Transform:
    """SPRING (Goldshlager, Abrahamsen & Lin, J. Comput. Phys. 2024, arXiv 2401.10190).

    Subsampled projected-increment natural gradient descent: the last direction is the prior of the
    least squares of this batch, of N residuals r with the Jacobian J, (N, P)::

        φ <- argmin_p ‖J p - r‖² + λ ‖p - μ φ‖²
           = μ φ + Jᵀ (J Jᵀ + λ I)⁻¹ (r - μ J φ)
           = Jᵀ (J Jᵀ + λ I)⁻¹ r + μ (φ - Jᵀ (J Jᵀ + λ I)⁻¹ J φ)
        d = φ

    With small λ, the part of φ that the rows of J span is replaced, and the rest is kept. J and r
    are those of :func:`engd` for residuals, and those of :func:`sr` for a wave function. On a batch
    that never changes, the limit has the damping ``(1 - μ) λ``.

    Args:
        damping: λ, positive, in units of the loss. The paper has 1e-3 for wave functions; for
            residuals less, such as 1e-6, is better.
        decay: μ, the weight of the last direction. The paper has 0.99, for many small steps.

    Returns:
        A method that costs what :func:`sr` does, and one product with J. Its state is one copy of
        the parameters. The paper's bound C on the squared step is
        ``fp.chain(fp.spring(), fp.scale(η), fp.clip_norm(C**0.5))``.

    Raises:
        ValueError: an option is out of range. ``fp.observe`` raises it where a BatchNorm in
            training mode couples the examples.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.chain(fp.spring(decay=0.9), fp.scale(0.05), fp.clip_norm(0.1))
    """
    need, solver = ResidualRows(), LeastSquares(damping)

    def update(
        state: SPRINGState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[SPRINGState, Params]:
        evidence = required(evidence, need)
        measured, last = evidence[need], state.direction
        rows = Gram.from_layers(measured.layers, grads)
        factor = solver.prepare(rows, grads)
        wide = treemath.cast(grads, last)
        step = solver.step(factor, measured, wide, evidence.is_own(grads))
        seen = solver.from_residual(factor, rows.matvec(last), last)
        direction = {k: step[k] + decay * (x - seen[k]) for k, x in last.items()}
        return SPRINGState(direction), treemath.cast(direction, grads)

    return fitted(
        Transform(
            lambda params: SPRINGState(treemath.zeros_like(params)), update, lambda t: (need,)
        ),
        lambda state: state.direction,
    )
