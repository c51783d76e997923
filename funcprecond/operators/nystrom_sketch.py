r"""Nyström: a randomised low-rank sketch of a positive semi-definite matrix, and CG with it.

From r products :math:`Y = A \Omega` with an orthonormal :math:`\Omega` the sketch is
:math:`Y (\Omega^T Y)^{-1} Y^T`, never above A and exact if A has rank r. As a preconditioner it
removes the r largest eigenvalues, so that CG sees only the rest (Frangella, Tropp & Udell, arXiv
2110.02820).
"""

from typing import Any

import torch
from torch import Tensor

from funcprecond.linalg import random, treemath
from funcprecond.linalg.precision import wide
from funcprecond.linalg.solution import Solution
from funcprecond.operators.low_rank import LowRank
from funcprecond.operators.operator import Operator
from funcprecond.operators.vector_stacks import stack
from funcprecond.tree import Params

__all__ = ["nystrom", "nystrom_cg"]


def nystrom(
    operator: Operator,
    rank: int,
    *,
    generator: torch.Generator | None = None,
    probes: Tensor | None = None,
) -> LowRank:
    """The Nyström sketch of a positive semi-definite operator.

    Args:
        operator: A, such as a :class:`funcprecond.GGN`; an indefinite one is lifted by the sketch's
            smallest eigenvalue.
        rank: r, the number of products.
        generator: draws the test matrix.
        probes: (r, P), the test matrix, if it is drawn already.

    Returns:
        A :class:`LowRank` with r values, not negative.
    """
    if not 1 <= rank <= operator.size:
        msg = f"rank must be between 1 and the {operator.size} parameters, not {rank}"
        raise ValueError(msg)
    dtype = operator.flat_options["dtype"]
    if probes is None:
        probes = random.normal((rank, operator.size), generator, **operator.flat_options)
    omega = torch.linalg.qr(wide(probes.mT))[0]
    rows = [treemath.unravel(row.to(dtype), operator.like) for row in omega.mT]
    product = operator @ stack(rows)
    y = wide(torch.cat([product[k].flatten(1) for k in operator.like], 1).mT)
    # A shift as large as the rounding error of the products, taken off again below.
    shift = torch.finfo(dtype).eps * operator.size**0.5 * torch.linalg.matrix_norm(y, 2)
    core = omega.mT @ y
    core = (core + core.mT) / 2
    lowest = torch.linalg.eigvalsh(core)[0]
    tiny = torch.finfo(y.dtype).tiny
    shift = shift.clamp_min(tiny) + (-lowest).clamp_min(0)
    y = y + shift * omega
    eye = torch.eye(rank, dtype=core.dtype, device=core.device)
    lower, _ = torch.linalg.cholesky_ex(core + shift * eye)
    b = torch.linalg.solve_triangular(lower, y.mT, upper=False).mT
    u, s, _ = torch.linalg.svd(b, full_matrices=False)
    values = (s**2 - shift).clamp_min(0.0)
    vectors = [treemath.unravel(row.to(dtype), operator.like) for row in u.mT]
    unknown = torch.full_like(values, torch.inf)
    return LowRank(values.to(dtype), stack(vectors), unknown.to(dtype))


def nystrom_cg(
    operator: Operator,
    b: Params,
    *,
    damping: float | Tensor,
    rank: int = 10,
    sketch: LowRank | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Solution:
    """``(A + damping I)^-1 b`` by CG with a Nyström preconditioner.

    Args:
        operator: A, positive semi-definite.
        b: the right-hand side.
        damping: λ, positive.
        rank: of the sketch.
        sketch: one that is there already, from :func:`nystrom`: it may be that of an earlier point.
        generator: draws the sketch's test matrix.
        **options: of :meth:`Operator.solve`.

    Raises:
        NotConverged: see :meth:`Operator.solve`.
    """
    sketch = nystrom(operator, rank, generator=generator) if sketch is None else sketch
    return operator.solve(
        b, damping=damping, precondition=sketch.preconditioner(damping), **options
    )
