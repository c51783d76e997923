r"""Lanczos: extreme eigenpairs, and the density of the whole spectrum.

After m products :math:`A V = V T + \beta_m v_{m+1} e_m^T` with orthonormal V and tridiagonal T,
whose eigenvalues (Ritz values) approach the extreme ones of A. Every new vector is made orthogonal
to all earlier ones, twice where it loses its length, so that float32 gives no ghosts. The small
eigenproblem of T is solved in float64.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from funcprecond import random, tree
from funcprecond.curvature.operator import Operator, stack
from funcprecond.evaluation import untransformed
from funcprecond.representation.low_rank import LowRank
from funcprecond.tree import state

__all__ = ["Krylov", "SpectralDensity", "eigsh", "lanczos", "spectral_density"]

Which = Literal["LM", "LA", "SA"]


@state
class Krylov:
    """A Krylov space; where it ended early, because it is invariant, the rest is zero.

    Attributes:
        basis: (m, P), orthonormal rows.
        alpha: (m,), T's diagonal, in float64.
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


def lanczos(operator: Operator, start: Tensor, steps: int, space: Krylov | None = None) -> Krylov:
    """The Krylov space of a symmetric operator.

    Args:
        operator: A.
        start: (P,), where it starts; its length does not matter.
        steps: m, the number of products. Memory: m vectors.
        space: a shorter space from the same start, which is gone on with.

    Where nothing watches it ends as soon as the space is invariant, with fewer than m vectors.
    """
    plain = untransformed((start, operator.like))
    v = start / start.norm()
    basis, alphas, betas = [], [], []
    if space is not None:
        v, basis = space.following, list(space.basis)
        alphas, betas = list(space.alpha), list(space.beta)
    # One buffer, where no transform needs to know what is written into it.
    buffer = v.new_empty(steps, v.numel()) if plain else None
    for i, row in enumerate(basis):
        if buffer is not None:
            buffer[i] = row
    size = torch.stack([*alphas, *betas, v.new_zeros((), dtype=torch.float64)]).abs().max()
    for i in range(len(alphas), steps):
        if buffer is not None:
            buffer[i] = v
            rows = buffer[: i + 1]
        else:
            basis.append(v)
            rows = torch.stack(basis)
        w = tree.ravel(operator @ tree.unravel(v, operator.like)).to(v.dtype)
        alpha = w.dot(v).double()
        w = w - alpha.to(w.dtype) * v
        if i:
            w = w - betas[-1].to(w.dtype) * rows[i - 1]
        # What the recursion leaves is small, unless little is left at all: then once more.
        before = w.norm()
        w = w - (rows @ w) @ rows
        beta = w.norm()
        if not (plain and bool(beta > 0.5 * before)):
            w = w - (rows @ w) @ rows
            beta = w.norm()
        size = torch.maximum(size, torch.maximum(alpha.abs(), beta.double()))
        # What is left beside T's own size is rounding: the space is invariant.
        alive = beta > 10 * torch.finfo(v.dtype).eps * math.sqrt(v.numel()) * size
        v = torch.where(alive, w / torch.where(alive, beta, 1.0), 0.0)
        alphas.append(alpha)
        betas.append(torch.where(alive, beta, 0.0).double())
        if plain and not bool(alive):
            break
    rows = torch.stack(basis) if buffer is None else buffer[: len(alphas)]
    return Krylov(rows, torch.stack(alphas), torch.stack(betas), v)


def eigsh(
    operator: Operator,
    k: int = 1,
    *,
    which: Which = "LM",
    tol: float = 1e-4,
    max_steps: int | None = None,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    throw: bool = True,
) -> LowRank:
    """The k extreme eigenpairs of a symmetric operator.

    Args:
        operator: A.
        k: how many.
        which: "LM" largest in magnitude, "LA" largest, "SA" smallest, as SciPy calls them.
        tol: an error bound this small beside the largest Ritz value ends the iteration.
        max_steps: at most so many products and vectors in memory; 10 k + 50 by default.
        generator: draws the start.
        start: (P,) instead.
        throw: raise if a bound is not below ``tol``; read ``bounds`` otherwise. Nothing is raised
            where a transform watches.

    Returns:
        A :class:`LowRank` of the eigenpairs, by falling magnitude for "LM" and from the end inwards
        otherwise. Of an eigenvalue that occurs several times, one vector is found.

    Raises:
        RuntimeError: see ``throw``.
        ValueError: k is not between 1 and P, or ``which`` is unknown.
    """
    if which not in ("LM", "LA", "SA") or not 1 <= k <= operator.size:
        msg = f"k must be in 1..{operator.size} and which 'LM', 'LA' or 'SA', not {k}, {which!r}"
        raise ValueError(msg)
    flat = tree.ravel(operator.like)
    if start is None:
        dtype = torch.promote_types(flat.dtype, torch.float32)
        start = random.normal(flat.shape, generator, dtype=dtype, device=flat.device)
    limit = min(operator.size, 10 * k + 50 if max_steps is None else max_steps)
    plain = untransformed((start, operator.like))
    space, steps = None, min(limit, 2 * k + 10) if plain else limit
    while True:
        space = lanczos(operator, start, steps, space)
        values, vectors, bounds = space.ritz()
        order = {"LM": values.abs().argsort(descending=True), "LA": values.argsort(descending=True)}
        chosen = order.get(which, values.argsort())[: min(k, len(values))]
        values, vectors, bounds = values[chosen], vectors[:, chosen], bounds[chosen]
        floor = tol * space.alpha.abs().max()
        if not plain or steps >= limit or len(space.alpha) < steps or bool((bounds <= floor).all()):
            break
        steps = min(limit, 2 * steps)
    if plain and throw and not bool((bounds <= floor).all()):
        msg = (
            f"{int((bounds > floor).sum())} of {k} eigenvalues are not known to {tol:g} after "
            f"{len(space.alpha)} products: raise max_steps or tol, or take them with throw=False"
        )
        raise RuntimeError(msg)
    rows = vectors.mT.to(space.basis.dtype) @ space.basis
    found = stack([tree.unravel(row, operator.like) for row in rows])
    dtype = space.basis.dtype
    return LowRank(values.to(dtype), found, bounds.to(dtype))


@state
class SpectralDensity:
    """Quadrature nodes of the spectrum, one set a probe: what stochastic Lanczos quadrature gives.

    Attributes:
        nodes: (probes, m), Ritz values.
        weights: (probes, m), the share of the spectrum at each; they sum to 1 for a probe.
        size: P, a 0-d tensor.
    """

    nodes: Tensor
    weights: Tensor
    size: Tensor

    def density(self, grid: Tensor, width: float | Tensor | None = None) -> Tensor:
        """The density of eigenvalues on a grid, integrating to 1.

        Args:
            grid: any shape.
            width: the standard deviation of the Gaussian that stands for each node; 1 % of the
                nodes' range by default.
        """
        if width is None:
            width = 0.01 * (self.nodes.max() - self.nodes.min())
        width = torch.as_tensor(width, dtype=self.nodes.dtype, device=self.nodes.device)
        width = width.clamp_min(torch.finfo(self.nodes.dtype).tiny)
        distance = (grid.to(self.nodes).unsqueeze(-1) - self.nodes.reshape(-1)) / width
        bells = torch.exp(-0.5 * distance**2) / (width * math.sqrt(2 * math.pi))
        return (bells * self.weights.reshape(-1)).sum(-1) / self.nodes.shape[0]

    def trace(self, function) -> tuple[Tensor, Tensor]:
        """The trace of a function of the matrix, as (estimate, standard error).

        ``function`` acts on eigenvalues: ``torch.log1p`` gives ``log det (I + A)``.
        """
        each = self.size * (self.weights * function(self.nodes)).sum(1)
        n = each.shape[0]
        error = each.std() / n**0.5 if n > 1 else torch.full_like(each[0], torch.nan)
        return each.mean(), error


def spectral_density(
    operator: Operator,
    *,
    probes: int = 1,
    steps: int = 100,
    generator: torch.Generator | None = None,
    vectors: Tensor | None = None,
) -> SpectralDensity:
    """The density of a symmetric operator's eigenvalues (stochastic Lanczos quadrature).

    Args:
        operator: A.
        probes: random sign vectors to average over.
        steps: products for each.
        generator: draws the probes.
        vectors: (probes, P) instead.

    Moments up to ``2 steps - 1`` of each probe's spectral measure are exact.
    """
    flat = tree.ravel(operator.like)
    if vectors is None:
        dtype = torch.promote_types(flat.dtype, torch.float32)
        shape = (probes, flat.numel())
        vectors = random.rademacher(shape, generator, dtype=dtype, device=flat.device)
    steps = min(steps, flat.numel())
    nodes, weights = [], []
    for v in vectors:
        values, columns, _ = lanczos(operator, v, steps).ritz()
        # A space that ended early is filled up with nodes that have no weight.
        missing = steps - len(values)
        nodes.append(torch.cat([values, values[-1:].expand(missing)]))
        weights.append(torch.cat([columns[0] ** 2, values.new_zeros(missing)]))
    size = torch.full_like(nodes[0][0], flat.numel())
    return SpectralDensity(torch.stack(nodes), torch.stack(weights), size)
