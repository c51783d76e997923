r"""The Nyström sketch, a randomized low-rank approximation, and conjugate gradients with it.

From r products :math:`Y = A \Omega` with an orthonormal :math:`\Omega`, the sketch of a positive
semi-definite A is :math:`Y (\Omega^T Y)^{-1} Y^T`. It is never larger than A, and equal to A if A
has rank r or less. As a preconditioner, it removes the effect of the r largest eigenvalues on the
convergence of conjugate gradients (Frangella, Tropp & Udell, arXiv 2110.02820).
"""

from typing import Any

import torch
from torch import Tensor

from funcprecond.linalg import random, treemath
from funcprecond.linalg.precision import wide
from funcprecond.linalg.solution import Solution
from funcprecond.operators.low_rank import LowRank
from funcprecond.operators.operator import Operator
from funcprecond.operators.solve import require_symmetric
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
    """The Nyström sketch ``Y (Ω^T Y)^-1 Y^T`` of a positive semi-definite operator, ``Y = A Ω``.

    Ω is a random matrix with r orthonormal columns (Frangella, Tropp & Udell, arXiv 2110.02820).

    Args:
        operator: A, such as a :class:`funcprecond.GGN`. If A is indefinite, a multiple of the
            identity that makes ``Ω^T A Ω`` positive definite is added to it before the sketch and
            subtracted from the eigenvalues of the sketch.
        rank: r, the number of columns of Ω.
        generator: draws Ω, if ``probes`` is None.
        probes: (r, P), random numbers whose transpose is orthonormalized to Ω. They make the result
            a function of its arguments, as transforms and compilers require.

    Returns:
        A :class:`funcprecond.LowRank` with r nonnegative values. Costs r products.

    Raises:
        TypeError: A is not symmetric.
        ValueError: ``rank`` is not between 1 and P, or ``generator`` and ``probes`` are both None.

    Example:
        >>> import torch, funcprecond as fp
        >>> like = {"w": torch.zeros(3)}
        >>> a = fp.operators.Matrix(torch.diag(torch.tensor([4.0, 1.0, 0.0])), like)
        >>> sketch = fp.nystrom(a, 2, generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(sketch.to_dense(), a.to_dense(), atol=1e-4)
        True
    """
    require_symmetric(operator, "nystrom()", "sketch one factor at a time")
    if not 1 <= rank <= operator.size:
        msg = f"rank must be between 1 and {operator.size}, the number of parameters, not {rank}"
        raise ValueError(msg)
    dtype = operator.flat_options["dtype"]
    if probes is None:
        probes = random.normal((rank, operator.size), generator, **operator.flat_options)
    omega = torch.linalg.qr(wide(probes.mT))[0]
    rows = [treemath.unravel(row.to(dtype), operator.like) for row in omega.mT]
    product = operator @ stack(rows)
    y = wide(torch.cat([product[k].flatten(1) for k in operator.like], 1).mT)
    # The shift is as large as the rounding error of the products; it is subtracted again below.
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
    """``(A + λ I)^-1 b`` by conjugate gradients with a Nyström preconditioner.

    The method is Nyström PCG (Frangella, Tropp & Udell, arXiv 2110.02820).

    Args:
        operator: A, positive semi-definite.
        b: the right-hand side, shaped like the parameters.
        damping: λ, positive.
        rank: the rank of the sketch.
        sketch: a sketch from an earlier call of :func:`nystrom`, to use instead of a new one. It
            may belong to an earlier point, since the preconditioner need not be exact.
        generator: draws the test matrix of the sketch, if ``sketch`` is None.
        **options: the further arguments of :meth:`funcprecond.Operator.solve`, such as ``tol``,
            ``max_iter`` and ``throw``.

    Returns:
        A :class:`funcprecond.Solution`. Costs ``rank`` products for a new sketch, and one product
        per iteration.

    Raises:
        NotConverged: the residual did not reach the tolerance and ``throw`` is true.
        ValueError: ``rank`` is not between 1 and P, or ``generator`` and ``sketch`` are both None.

    Example:
        >>> import torch, funcprecond as fp
        >>> like = {"w": torch.zeros(3)}
        >>> a = fp.operators.Matrix(torch.diag(torch.tensor([3.0, 1.0, 0.0])), like)
        >>> generator = torch.Generator().manual_seed(0)
        >>> b = {"w": torch.tensor([4.0, 2.0, 1.0])}
        >>> found = fp.nystrom_cg(a, b, damping=1.0, rank=2, generator=generator)
        >>> torch.allclose(found.solution["w"], torch.ones(3), atol=1e-3)
        True
    """
    sketch = nystrom(operator, rank, generator=generator) if sketch is None else sketch
    return operator.solve(
        b, damping=damping, precondition=sketch.preconditioner(damping), **options
    )
