r"""Lanczos: a Krylov space, and the density of the whole spectrum.

After m products :math:`A V = V T + \beta_m v_{m+1} e_m^T` with orthonormal V and tridiagonal T,
whose eigenvalues (Ritz values) approach the extreme ones of A. Every new vector is made orthogonal
to all earlier ones, twice where it loses its length, so that float32 gives no ghosts. The small
eigenproblem of T is solved in float64, where the device has it.
"""

import math

import torch
from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.linalg.precision import wide, wide_dtype
from funcprecond.operators.operator import Operator
from funcprecond.tracing import is_eager
from funcprecond.tree import state

__all__ = ["Krylov", "lanczos"]


@state
class Krylov:
    """A Krylov space; where it ended early, because it is invariant, the rest is zero.

    Attributes:
        basis: (m, P), orthonormal rows; none if they were not kept.
        alpha: (m,), T's diagonal, :func:`wide`.
        beta: (m,), the entries beside it; the last one leads out of the space.
        following: (P,), the vector that it leads to; zero if the space is invariant.
    """

    basis: Tensor
    alpha: Tensor
    beta: Tensor
    following: Tensor

    def tridiagonal(self) -> Tensor:
        """(m, m): T."""
        off = self.beta[:-1]
        return torch.diag(self.alpha) + torch.diag(off, 1) + torch.diag(off, -1)

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """(values, vectors as columns, error bounds ``beta_m |last entry|``) of T."""
        values, vectors = torch.linalg.eigh(self.tridiagonal())
        return values, vectors, (self.beta[-1] * vectors[-1]).abs()


def lanczos(
    operator: Operator, start: Tensor, steps: int, *, reorthogonalize: bool = True
) -> Krylov:
    """The Krylov space of a symmetric operator.

    Args:
        operator: A.
        start: (P,), where it starts; its length does not matter.
        steps: m, the number of products. Memory: m vectors.
        reorthogonalize: make each vector orthogonal to all before it; if not, three vectors are in
            memory, none is returned, and eigenvalues that are found already come up again.

    Where nothing watches it ends as soon as the space is invariant, with fewer than m vectors.
    """
    plain = is_eager((start, operator.like))
    v = start / start.norm()
    del start  # it is not kept, where the caller does not
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
                # Transforms must know of it; of this form, compilers write in place.
                row = torch.full((1,), i, device=v.device)
                buffer = buffer.index_copy(0, row, v.unsqueeze(0))
            rows = buffer[: i + 1]
        vector = treemath.cast(treemath.unravel(v, operator.like), operator.like)
        w = treemath.ravel(operator.matvec(vector)).to(v.dtype)
        alpha = wide(w.dot(v))
        # What is joined to one vector is new, and written over while nothing watches.
        own = plain and not w.requires_grad
        out = w if own else None
        w = torch.addcmul(w, v, -alpha.to(w.dtype), out=out)
        if i:
            w = torch.addcmul(w, previous, -betas[-1].to(w.dtype), out=out)
        before = w.norm()
        beta = before
        if reorthogonalize:
            # What the recursion leaves is small, unless little is left at all: then once more.
            w = _without(w, rows)
            beta = w.norm()
            if not (plain and bool(beta > 0.5 * before)):
                w = _without(w, rows)
                beta = w.norm()
        size = torch.maximum(size, torch.maximum(alpha.abs(), wide(beta)))
        # What is left beside T's own size is rounding: the space is invariant.
        alive = beta > 10 * torch.finfo(v.dtype).eps * math.sqrt(v.numel()) * size
        inverse = torch.where(alive, 1 / torch.where(alive, beta, 1.0), 0.0)
        previous, v = v, torch.mul(w, inverse, out=w if own else None)
        del w  # while the next product is taken
        alphas.append(alpha)
        betas.append(wide(torch.where(alive, beta, 0.0)))
        if plain and not bool(alive):
            break
    return Krylov(rows, torch.stack(alphas), torch.stack(betas), v)


def _without(w: Tensor, rows: Tensor) -> Tensor:
    """What is left of a vector beside orthonormal rows."""
    # As matrices: a compiler takes products of a matrix and a vector apart into slow loops.
    w = w.unsqueeze(0)
    return torch.addmm(w, w @ rows.mT, rows, alpha=-1).squeeze(0)
