"""KL-Shampoo: factors whose Kronecker product is closest in Kullback-Leibler divergence."""

from typing import Literal

import torch
from torch import Tensor

from funcprecond.checks import one_of
from funcprecond.evidence import Evidence
from funcprecond.linalg import treemath
from funcprecond.linalg.axes import along
from funcprecond.linalg.blocking import Blocking
from funcprecond.linalg.eigenbases import (
    Bases,
    eigenvalues_in,
    rotate,
    rotate_back,
    turned_eigenvalues,
)
from funcprecond.linalg.whitening import whitened
from funcprecond.methods.adam import adam
from funcprecond.methods.card import card
from funcprecond.representation.average import accumulate
from funcprecond.solver.followed_eigenbases import FollowedEigenbases
from funcprecond.transform import Transform, counter
from funcprecond.transforms.in_blocks import in_blocks
from funcprecond.transforms.partition import partition
from funcprecond.tree import Params, map, state

__all__ = ["KLShampooState", "kl_shampoo"]


@state
class KLShampooState:
    """What KL-Shampoo keeps, in float32 or wider.

    Attributes:
        statistics, bases: for each parameter a tuple of S_i and one of Q_i, by axis.
        eigenvalues: a tuple of l_i, (n_i,), by the columns of Q_i.
        mean: m, shaped like the parameters.
        step: the number of updates.
    """

    statistics: Bases
    bases: Bases
    eigenvalues: Bases
    mean: Params
    step: Tensor


@card(
    "KL-Shampoo (Lin 2026)",
    curvature="(F̂_emp^batch)^½",
    representation="layer, KF-dim",
    solver="G direct, eigendecomposition",
    learning_rate=0.03,
    carries_momentum=True,
)
def kl_shampoo(
    *,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.98),
    damping: float | Tensor = 1e-8,
    initial: float = 0.1,
    limit: int = 4000,
    first: Literal["identity", "skip"] = "identity",
    refresh: Literal["qr", "eigh"] = "qr",
    epsilon: float | Tensor = 1e-6,
    merge: int = 0,
    block: int = 0,
    max_dim: int = 0,
    every: int = 1,
    refresh_every: int = 10,
    start: int = 0,
) -> Transform:
    """KL-Shampoo (Lin, Lowe, Dangel, Eschenhagen, Xu & Grosse, ICLR 2026, arXiv 2509.03378).

    Shampoo's factors, but each sees the gradient whitened by the others. For a matrix of n_1 by n_2
    entries, Q_i the basis of the factor S_i and l_i the eigenvalues followed in it::

        m <- b1 m + (1 - b1) G
        d  = Q_1 ( Q_1ᵀ m Q_2 · r / (1 + damping r) ) Q_2ᵀ,        r_ij = (l_1i l_2j)^(-1/2)
        G' = Q_1ᵀ G Q_2
        l_1i <- b2 l_1i + (1 - b2) mean_j G'_ij² / l_2j
        S_1 <- b2 S_1 + (1 - b2) G Q_2 diag(1 / l_2) Q_2ᵀ Gᵀ / n_2       the second axis likewise
        now and then  Q_i <- qr(S_i Q_i)

    The direction is taken before the statistics see G. Of more axes, all others whiten, and their
    product of lengths divides. Vectors and scalars go to Adam.

    Args:
        betas: the weights of the old mean and of the old statistics.
        damping: added to the root of the curvature.
        initial: the eigenvalues before anything was seen.
        limit: of 1 / sqrt(l_i): at most ``max(10, min(n_i, limit))``.
        first: the first step is taken in the identity's basis, or only used to find the first bases
            ("skip", the authors' code).
        refresh, epsilon: how bases are followed, as for :func:`funcprecond.soap`. With "eigh" the
            eigenvalues are those of S_i, which then starts at ``initial`` times the identity; with
            ``refresh_every=1`` that is the paper's idealised method.
        merge, block, max_dim: how parameters are cut into blocks, as for
            :func:`funcprecond.shampoo`. Without any factor a parameter goes to Adam.
        every, refresh_every, start: the intervals of the statistics and of the bases.

    Returns:
        A method that needs the gradient only. It keeps 2 Σ n_i² numbers and one copy for a
        parameter; a step takes k + 3 products for each of k axes, a refresh a product and a QR.

    Raises:
        ValueError: an option has a value that it cannot have.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.chain(fp.kl_shampoo(), fp.weight_decay(0.01), fp.scale(3e-3))
    """
    one_of(("identity", "skip"), first=first)
    b1, b2 = betas
    basis = FollowedEigenbases(every, refresh_every, start, refresh, epsilon, False, max_dim)

    def init(params: Params) -> KLShampooState:
        eyes = basis.identities(params)
        start_at = map(lambda x: (initial if refresh == "eigh" else 0.0) * x, eyes)
        values = map(lambda x: torch.full_like(x[0], initial), eyes)
        return KLShampooState(start_at, eyes, values, treemath.zeros_like(params), counter(params))

    def update(
        state: KLShampooState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[KLShampooState, Params]:
        step = state.step + 1

        def begun(new: Tensor, old: Tensor | float) -> Tensor:
            return new if first == "identity" else torch.where(step > 1, new, old)

        statistics, eigenvalues, mean, direction = {}, {}, {}, {}
        for name, old in state.mean.items():
            bases, axes = state.bases[name], basis.axes(old.shape)
            s, values = state.statistics[name], state.eigenvalues[name]
            roots = tuple(x.rsqrt() for x in values)
            g = grads[name].to(old.dtype)
            m, r = accumulate(old, g, b1), along(roots, axes, old)
            d = rotate_back(rotate(m, bases, axes) * (r / (1 + damping * r)), bases, axes)
            if basis.are_measured(evidence):
                grams, squares = whitened(g, bases, roots, axes)
                # A skipped first gradient is not whitened by eigenvalues of nothing.
                plain = initial ** (len(axes) - 1)
                pairs = zip(s, grams, strict=True)
                s = tuple(accumulate(x, begun(c, plain * c), b2) for x, c in pairs)
                pairs = zip(values, squares, strict=True)
                values = tuple(begun(_floored(accumulate(x, v, b2), limit), x) for x, v in pairs)
            statistics[name], eigenvalues[name] = s, values
            mean[name] = begun(m, old)
            direction[name] = begun(d, 0.0).to(grads[name].dtype)
        bases, how = basis.refreshed(statistics, state.bases, evidence)
        for name, new in bases.items() if how == "decomposed" else ():
            if refresh == "eigh":
                values = eigenvalues_in(statistics[name], new)
            else:
                values = turned_eigenvalues(eigenvalues[name], state.bases[name], new)
            eigenvalues[name] = tuple(_floored(x, limit) for x in values)
        return KLShampooState(statistics, bases, eigenvalues, mean, step), direction

    either = partition(
        lambda name, p: "matrices" if basis.axes(p.shape) else "vectors",
        matrices=Transform(init, update, basis.needs),
        vectors=adam(betas=betas, damping=damping),
    )
    return in_blocks(either, Blocking(merge, block, max_dim))


def _floored(eigenvalues: Tensor, limit: int) -> Tensor:
    return eigenvalues.clamp_min(max(10, min(eigenvalues.shape[-1], limit)) ** -2.0)
