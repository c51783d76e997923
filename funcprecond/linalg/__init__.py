"""Linear algebra that does not depend on models: iterative solvers, matrix roots, factorizations.

The iterative solvers take a product ``matvec`` and a right-hand side ``b``. Their vectors are dicts
of tensors.
"""

from funcprecond.linalg.conjugate_gradients import CGResult, cg
from funcprecond.linalg.inverse_roots import inverse_root
from funcprecond.linalg.minimal_residual import minres
from funcprecond.linalg.neumann_series import neumann
from funcprecond.linalg.solution import Matvec, NotConverged, Solution, Stop
from funcprecond.linalg.trust_region import truncated_cg

__all__ = [
    "CGResult",
    "Matvec",
    "NotConverged",
    "Solution",
    "Stop",
    "cg",
    "inverse_root",
    "minres",
    "neumann",
    "truncated_cg",
]
