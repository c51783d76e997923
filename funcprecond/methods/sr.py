"""Stochastic reconfiguration: the natural gradient of variational Monte Carlo."""

from torch import Tensor

from funcprecond.curvature.residual_rows import ResidualRows
from funcprecond.evidence import Evidence, required
from funcprecond.methods.card import card
from funcprecond.representation.gram import Gram
from funcprecond.solver.least_squares import LeastSquares
from funcprecond.transform import Transform, check_present
from funcprecond.tree import Params

__all__ = ["sr"]


@card(
    "SR (Sorella 1998)",
    curvature="F/4 of a density",
    representation="full, Gram, centred",
    solver="L direct, SMW or Cholesky inverse",
    learning_rate=0.1,
    options={"damping": 1.0},
)
def sr(*, damping: float | Tensor = 1e-3) -> Transform:
    """Stochastic reconfiguration (Sorella 1998), also as minSR (Chen & Heyl 2024).

    The scores ``∇ log ψ`` of N samples of ``|ψ|²`` with weights ω make up U, (N, P), and their
    local energies E_L make up r, (N,)::

        U = √ω [∇ log ψ - mean],    r = √ω (E_L - mean),    ∇E = 2 Uᵀ r
        N >= P:  d = (Uᵀ U + λ I)⁻¹ Uᵀ r                        SR
        N < P:   d = Uᵀ (U Uᵀ + λ I)⁻¹ r                        minSR, the same vector

    ``4 UᵀU`` is the Fisher matrix F of the density ``|ψ|²``, so that d is twice
    ``(F + 4 λ I)⁻¹ ∇E``: one step of imaginary time, projected on what the parameters can express.
    On a problem that is not of :func:`vmc`, U is a square root of the Gauss-Newton matrix.

    Args:
        damping: λ, positive, the ridge of ``UᵀU``.

    Returns:
        A method without a state. It costs a gradient of log ψ for each sample,
        ``N P min(N, P)`` operations for the matrix, and ``min(N, P)³ / 3`` for the solve. Steps of
        at most the length c are ``fp.chain(fp.sr(), fp.scale(0.1), fp.clip_norm(c))``.

    Raises:
        ValueError: the damping is out of range. ``fp.observe`` raises it where a BatchNorm in
            training mode couples the examples.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.chain(fp.sr(damping=1e-3), fp.scale(0.1), fp.clip_norm(0.1))
    """
    need, solver = ResidualRows(), LeastSquares(damping)

    def update(
        state: tuple, grads: Params, evidence: Evidence | None = None
    ) -> tuple[tuple, Params]:
        evidence = required(evidence, need)
        check_present(grads)
        measured = evidence[need]
        factor = solver.prepare(Gram.from_layers(measured.layers, grads), grads)
        return state, solver.step(factor, measured, grads, evidence.is_own(grads))

    return Transform(lambda params: (), update, lambda t: (need,))
