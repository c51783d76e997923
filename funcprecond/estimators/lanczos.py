r"""The Lanczos iteration, which computes an orthonormal basis of a Krylov space.

After m products, :math:`A V = V T + \beta_m v_{m+1} e_m^T` with orthonormal V and tridiagonal T.
The eigenvalues of T (Ritz values) approximate the extreme eigenvalues of A. Each new vector is made
orthogonal to all previous ones, and a second time if the first pass removes most of its length, so
that rounding in float32 does not make an eigenvalue appear more than once. The small eigenproblem
of T is solved in float64 where the device supports it.
"""

import math

import torch
from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.linalg.precision import wide, wide_dtype
from funcprecond.operators.operator import Operator
from funcprecond.tracing import is_eager
from funcprecond.tree import state

__all__ = ["Krylov", "finite_eigh", "lanczos"]


@state
class Krylov:
    """An orthonormal basis of a Krylov space, and the projection T of the operator onto it.

    If the space becomes invariant before m steps and the iteration cannot end there (see
    :func:`lanczos`), the remaining entries are zero.

    Attributes:
        basis: (m, P), the columns of V as rows; (0, P) if they were not stored.
        alpha: (m,), the diagonal of T, in :func:`wide_dtype`.
        beta: (m,), the off-diagonal entries of T, and last ``beta_m``.
        following: (P,), ``v_{m+1}``; zero if the space is invariant.
    """

    basis: Tensor
    alpha: Tensor
    beta: Tensor
    following: Tensor

    def tridiagonal(self) -> Tensor:
        """T, (m, m)."""
        off = self.beta[:-1]
        return torch.diag(self.alpha) + torch.diag(off, 1) + torch.diag(off, -1)

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """The eigenpairs of T.

        Returns:
            The eigenvalues, (m,); the eigenvectors, as the columns of (m, m); and the error bounds
            ``beta_m |last entry of the eigenvector|``, (m,).
        """
        values, vectors = finite_eigh(self.tridiagonal())
        return values, vectors, (self.beta[-1] * vectors[-1]).abs()


def lanczos(
    operator: Operator, start: Tensor, steps: int, *, reorthogonalize: bool = True
) -> Krylov:
    """The Krylov space of a symmetric operator.

    Args:
        operator: A.
        start: (P,), the first vector; its length does not matter.
        steps: m, the number of products.
        reorthogonalize: whether each vector is made orthogonal to all previous ones, for which m
            vectors are stored. If not, three vectors are stored, none is returned, and rounding
            makes some eigenvalues appear more than once.

    Returns:
        A :class:`Krylov` space. In eager mode the iteration ends as soon as the space is invariant,
        with fewer than m vectors, and the space has no derivatives, even if the operator's data
        require them; under a transform or a compiler it always takes m steps.
    """
    plain = is_eager((start, operator.like))
    v = start / start.norm()
    del start  # so that its memory is freed if the caller does not hold it
    previous = v
    alphas, betas = [], []
    buffer = v.new_empty(steps if reorthogonalize else 0, v.numel())
    rows = buffer[:0]
    size = v.new_zeros((), dtype=wide_dtype(v))
    for i in range(steps):
        if reorthogonalize:
            if plain:
                buffer[i] = v
                v = buffer[i]
            else:
                # Transforms need an out-of-place operation; compilers turn this one into an
                # in-place write.
                row = torch.full((1,), i, device=v.device)
                buffer = buffer.index_copy(0, row, v.unsqueeze(0))
            rows = buffer[: i + 1]
        vector = treemath.cast(treemath.unravel(v, operator.like), operator.like)
        w = treemath.ravel(operator.matvec(vector)).to(v.dtype)
        w = w.detach() if plain else w
        alpha = wide(w.dot(v))
        # w is a new tensor, so in eager mode it may be overwritten.
        own = plain and not w.requires_grad
        out = w if own else None
        w = torch.addcmul(w, v, -alpha.to(w.dtype), out=out)
        if i:
            w = torch.addcmul(w, previous, -betas[-1].to(w.dtype), out=out)
        before = w.norm()
        beta = before
        if reorthogonalize:
            # A second pass is needed only if the first one removed most of the vector's length.
            w = _without(w, rows)
            beta = w.norm()
            if not (plain and bool(beta > 0.5 * before)):
                w = _without(w, rows)
                beta = w.norm()
        size = torch.maximum(size, torch.maximum(alpha.abs(), wide(beta)))
        # If beta is within rounding of zero compared with T, the space is invariant.
        alive = beta > 10 * torch.finfo(v.dtype).eps * math.sqrt(v.numel()) * size
        inverse = torch.where(alive, 1 / torch.where(alive, beta, 1.0), 0.0)
        previous, v = v, torch.mul(w, inverse, out=w if own else None)
        del w  # frees its memory before the next product
        alphas.append(alpha)
        betas.append(wide(torch.where(alive, beta, 0.0)))
        if plain and not bool(alive):
            break
    return Krylov(rows, torch.stack(alphas), torch.stack(betas), v)


def finite_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues and eigenvectors of a projection.

    Raises:
        ValueError: in eager mode, the matrix is not finite.
    """
    if is_eager(matrix) and not bool(torch.isfinite(matrix).all()):
        msg = (
            "a product of the operator with a vector has NaN or infinite entries, so that it has "
            "no eigenvalues: check the parameters and the data; training may have diverged"
        )
        raise ValueError(msg)
    return torch.linalg.eigh(matrix)


def _without(w: Tensor, rows: Tensor) -> Tensor:
    """The component of a vector that is orthogonal to the orthonormal rows of a matrix."""
    # In matrix form, because a compiler turns matrix-vector products into slow loops.
    w = w.unsqueeze(0)
    return torch.addmm(w, w @ rows.mT, rows, alpha=-1).squeeze(0)
