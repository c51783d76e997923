"""Stage 3: how ``C^-1 g`` is computed.

Each file has one solver, which is a frozen configuration with two functions. :class:`Solver` is
their protocol: ``prepare(representation, previous)`` is expensive and runs at an interval, and
``apply(factor, grads)`` is cheap and runs at every step.
"""

from funcprecond.solver.axis_inverse import AxisInverse
from funcprecond.solver.cholesky import Cholesky
from funcprecond.solver.dense_cholesky import DenseCholesky
from funcprecond.solver.divide import Divide
from funcprecond.solver.eigen import Eigen
from funcprecond.solver.followed_eigenbases import FollowedEigenbases
from funcprecond.solver.input_inverse import InputInverse
from funcprecond.solver.inverse_root import InverseRoot
from funcprecond.solver.kronecker_sum import KroneckerSum
from funcprecond.solver.least_squares import LeastSquares
from funcprecond.solver.rank_one import RankOne
from funcprecond.solver.smw import SMW
from funcprecond.solver.solver import Solver
from funcprecond.solver.unit_inverse import UnitInverse

__all__ = [
    "SMW",
    "AxisInverse",
    "Cholesky",
    "DenseCholesky",
    "Divide",
    "Eigen",
    "FollowedEigenbases",
    "InputInverse",
    "InverseRoot",
    "KroneckerSum",
    "LeastSquares",
    "RankOne",
    "Solver",
    "UnitInverse",
]
