"""KL-Shampoo: factors whose Kronecker product is closest in Kullback-Leibler divergence."""

from typing import Literal

import torch
from torch import Tensor

from funcprecond.checks import one_of
from funcprecond.evidence import Evidence
from funcprecond.linalg import eigenbases, treemath, whitening
from funcprecond.linalg.axes import along
from funcprecond.linalg.blocking import Blocking
from funcprecond.linalg.eigenbases import Bases, floored, rotate, rotate_back
from funcprecond.methods.adam import adam
from funcprecond.methods.card import card
from funcprecond.representation.average import accumulate
from funcprecond.solver.followed_eigenbases import FollowedEigenbases
from funcprecond.transform import Transform, counter, fitted
from funcprecond.transforms.in_blocks import in_blocks
from funcprecond.transforms.partition import partition
from funcprecond.tree import Params, map, state

__all__ = ["KLShampooState", "kl_shampoo"]


@state
class KLShampooState:
    """The state of KL-Shampoo, in float32 or wider.

    Attributes:
        statistics, bases, eigenvalues: for each parameter, tuples of S_i, Q_i and l_i by axis.
        mean, step: m, shaped like the parameters, and the number of updates.
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
    max_dim: int = 10000,
    every: int = 1,
    refresh_every: int = 10,
    start: int = 0,
) -> Transform:
    """KL-Shampoo (Lin, Lowe, Dangel, Eschenhagen, Xu & Grosse, ICLR 2026, arXiv 2509.03378).

    The Kronecker product of the factors is the one closest to the second moment of the gradient in
    Kullback-Leibler divergence. Each factor therefore sees the gradient whitened by the others. For
    an n_1 × n_2 matrix, with Q_i the basis of the factor S_i and l_i its eigenvalues::

        m <- b1 m + (1 - b1) G
        d  = Q_1 ( Q_1ᵀ m Q_2 · r / (1 + damping r) ) Q_2ᵀ,        r_ij = (l_1i l_2j)^(-1/2)
        G' = Q_1ᵀ G Q_2
        l_1i <- b2 l_1i + (1 - b2) mean_j G'_ij² / l_2j
        S_1 <- b2 S_1 + (1 - b2) G Q_2 diag(1 / l_2) Q_2ᵀ Gᵀ / n_2       the second axis likewise
        at each refresh  Q_i <- qr(S_i Q_i)

    The direction is computed before G enters the statistics. For a tensor of more axes, all other
    axes whiten and n_2 becomes the product of their lengths. Where no axis has a factor, Adam runs.

    Args:
        betas: (b1, b2), the weights of the old mean and of the old statistics.
        damping: added to the root of the curvature.
        initial, limit: the first l_i; ``1 / sqrt(l_i)`` is at most ``max(10, min(n_i, limit))``.
        first: "identity" steps with ``Q_i = I``; "skip" only finds the bases, as the authors' code.
        refresh, epsilon: as for :func:`funcprecond.soap`. With "eigh" l_i are the eigenvalues of
            S_i, which starts at ``initial`` times I; ``refresh_every=1`` is the idealized method.
        merge, block, max_dim: as for :func:`funcprecond.shampoo`.
        every, refresh_every, start: the intervals of the statistics and of the bases, in steps.

    Returns:
        A method that needs the gradient only. Its state is 2 Σ n_i² numbers and one copy of each
        parameter. A step takes k + 3 products for each of k axes; a refresh a product and a QR.

    Raises:
        ValueError: an option has a value that is not allowed.

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
        def begun(new: Tensor, old: Tensor | float) -> Tensor:
            return new if first == "identity" else torch.where(state.step > 0, new, old)

        statistics, eigenvalues, mean, direction = {}, {}, {}, {}
        for name, old in state.mean.items():
            bases, axes = state.bases[name], basis.axes(old.shape)
            s, values = state.statistics[name], state.eigenvalues[name]
            roots = tuple(x.rsqrt() for x in values)
            g = grads[name].to(old.dtype)
            m, r = accumulate(old, g, b1), along(roots, axes, old)
            d = rotate_back(rotate(m, bases, axes) * (r / (1 + damping * r)), bases, axes)
            if basis.are_measured(evidence):
                grams, squares = whitening.whitened(g, bases, roots, axes)
                # The first gradient, if skipped, must not be whitened by the initial eigenvalues.
                grams = [begun(c, initial ** (len(axes) - 1) * c) for c in grams]
                s = tuple(accumulate(x, c, b2) for x, c in zip(s, grams, strict=True))
                pairs = zip(values, squares, strict=True)
                values = tuple(begun(floored(accumulate(x, v, b2), limit), x) for x, v in pairs)
            statistics[name], eigenvalues[name] = s, values
            mean[name], direction[name] = begun(m, old), begun(d, 0.0)
        bases, how = basis.refreshed(statistics, state.bases, evidence)
        for name, new in bases.items() if how == "decomposed" else ():
            values = eigenbases.turned_eigenvalues(eigenvalues[name], state.bases[name], new)
            if refresh == "eigh":
                values = eigenbases.eigenvalues_in(statistics[name], new)
            eigenvalues[name] = tuple(floored(x, limit) for x in values)
        new = KLShampooState(statistics, bases, eigenvalues, mean, state.step + 1)
        return new, treemath.cast(direction, grads)

    def kind(name: str, p: Tensor) -> str:
        return "matrix" if basis.axes(p.shape) else "vector"

    matrix = fitted(Transform(init, update, basis.needs), lambda state: state.mean)
    vector = adam(betas=betas, damping=damping)
    return in_blocks(partition(kind, matrix=matrix, vector=vector), Blocking(merge, block, max_dim))
