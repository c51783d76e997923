"""KL-Shampoo: factors whose Kronecker product is closest in Kullback-Leibler divergence.

Row: (F̂_emp^batch)^½; layer, KF-dim; eigendecomposition. Lin, Lowe, Dangel, Eschenhagen, Xu &
Grosse, ICLR 2026, arXiv 2509.03378. Shampoo's factors, but each sees the gradient whitened by the
others. For a matrix of n_1 by n_2 entries, Q_i the basis of the factor S_i and l_i the eigenvalues
followed in it::

    m <- b1 m + (1 - b1) G
    d  = Q_1 ( Q_1ᵀ m Q_2 · r / (1 + damping r) ) Q_2ᵀ,        r_ij = (l_1i l_2j)^(-1/2)
    G' = Q_1ᵀ G Q_2
    l_1i <- b2 l_1i + (1 - b2) mean_j G'_ij² / l_2j
    S_1 <- b2 S_1 + (1 - b2) G Q_2 diag(1 / l_2) Q_2ᵀ Gᵀ / n_2           the second axis likewise
    now and then  Q_i <- qr(S_i Q_i)

The direction is taken before the statistics see G. Of more axes, all others whiten, and their
product of lengths divides. Scale is of the product only: c S_1 and S_2 / c are as good. Needs the
gradient only; 2 Σ n_i² numbers and one copy a parameter; each step k + 3 products an axis, each
refresh a product and a QR decomposition. Vectors and scalars go to Adam.
"""

import sys
from typing import Literal

import torch
from torch import Tensor

from funcprecond.evidence import Evidence
from funcprecond.linalg.blocking import Blocking, in_blocks
from funcprecond.linalg.eigenbases import (
    Bases,
    axes_below,
    decomposed,
    followed,
    identities,
    rotate,
    rotate_back,
    turns,
)
from funcprecond.linalg.precision import factor_dtype
from funcprecond.methods.adam import AdamState, adam
from funcprecond.methods.table import Card
from funcprecond.need import Every, Need
from funcprecond.representation.average import accumulate
from funcprecond.representation.kronecker_dim import mode_gram
from funcprecond.solver.inverse_root import mode_product
from funcprecond.transform import Transform, counter
from funcprecond.tree import Params, state

__all__ = ["KLShampooState", "kl_shampoo", "whitened"]


@state
class KLShampooState:
    """What KL-Shampoo keeps, in float32 or wider.

    Attributes:
        statistics, bases: for each parameter with factors a tuple of S_i and one of Q_i, by axis.
        eigenvalues: a tuple of l_i, (n_i,), by the columns of Q_i.
        mean: m, shaped like the parameters.
        step: the number of updates.
        rest: Adam's state of the other parameters.
    """

    statistics: Bases
    bases: Bases
    eigenvalues: Bases
    mean: Params
    step: Tensor
    rest: AdamState


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
    """KL-Shampoo's direction.

    Args:
        betas: the weights of the old mean and of the old statistics.
        damping: added to the root of the curvature.
        initial: the eigenvalues before anything was seen.
        limit: of 1 / sqrt(l_i): at most ``max(10, min(n_i, limit))``. Without one, what was never
            seen would be divided by nothing.
        first: the first step is taken in the identity's basis, or only used to find the first bases
            ("skip", the authors' code).
        refresh: "qr" follows bases, and eigenvalues on their own. "eigh" takes both from S_i, which
            then starts at ``initial`` times the identity; with ``refresh_every=1`` that is the
            paper's idealised method.
        epsilon: the QR step's shift, see :func:`funcprecond.linalg.eigenbases.orthogonal_step`; 0
            in the authors' code.
        merge, block, max_dim: how parameters are cut into blocks, see
            :class:`funcprecond.linalg.blocking.Blocking`; by default they are whole. Without
            any factor a parameter goes to Adam.
        every, refresh_every, start: the intervals of the statistics and of the bases, see
            :func:`funcprecond.composition`. The first bases, those before ``start``, and all of an
            ``update`` without evidence come from a decomposition.
    """
    b1, b2 = betas
    vectors = adam(betas=betas, damping=damping)
    measure, turn = Every("measure", every, start), Every("refresh", refresh_every, start)
    afresh = Every("decompose", refresh_every if refresh == "eigh" else sys.maxsize, start)
    zero = initial if refresh == "eigh" else 0.0

    def init(params: Params) -> KLShampooState:
        axes = {k: axes_below(p.shape, max_dim) for k, p in params.items()}
        matrices = {k: p for k, p in params.items() if axes[k]}
        eyes = {k: identities(p, axes[k], factor_dtype(p)) for k, p in matrices.items()}
        return KLShampooState(
            {k: tuple(zero * x for x in e) for k, e in eyes.items()},
            eyes,
            {k: tuple(torch.full_like(x[0], initial) for x in e) for k, e in eyes.items()},
            {k: torch.zeros_like(p, dtype=factor_dtype(p)) for k, p in matrices.items()},
            counter(params),
            vectors.init({k: p for k, p in params.items() if k not in matrices}),
        )

    def update(
        state: KLShampooState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[KLShampooState, Params]:
        others = {k: g for k, g in grads.items() if k not in state.mean}
        rest, direction = vectors.update(state.rest, others)
        step = state.step + 1
        begun = step > 1
        statistics, eigenvalues, mean = {}, {}, {}
        for name, old in state.mean.items():
            bases, axes = state.bases[name], axes_below(old.shape, max_dim)
            roots = tuple(x.rsqrt() for x in state.eigenvalues[name])
            g = grads[name].to(old.dtype)
            m = accumulate(old, g, b1)
            r = _along(roots, axes, old)
            d = rotate_back(rotate(m, bases, axes) * (r / (1 + damping * r)), bases, axes)
            s, values = state.statistics[name], state.eigenvalues[name]
            if evidence is None or measure in evidence:
                grams, magnitudes = whitened(g, bases, roots, axes)
                if first == "skip":
                    # The first gradient is not whitened by eigenvalues that nothing was seen of.
                    plain = initial ** (len(axes) - 1)
                    grams = tuple(torch.where(begun, c, plain * c) for c in grams)
                s = tuple(accumulate(x, c, b2) for x, c in zip(s, grams, strict=True))
                new = tuple(accumulate(x, v, b2) for x, v in zip(values, magnitudes, strict=True))
                new = tuple(_floored(x, limit) for x in new)
                pairs = zip(new, values, strict=True)
                values = tuple(_kept(first, begun, x, y) for x, y in pairs)
            statistics[name], eigenvalues[name] = s, values
            mean[name] = m if first == "identity" else torch.where(begun, m, old)
            direction[name] = _kept(first, begun, d, 0.0 * d).to(grads[name].dtype)
        bases = state.bases
        if evidence is None or afresh in evidence:
            bases = decomposed(statistics, bases)
            for name, new in bases.items():
                if refresh == "eigh":
                    of = zip(new, statistics[name], strict=True)
                    found = [(q * (s @ q)).sum(-2) for q, s in of]
                else:
                    # The diagonal of the old ``Q diag(l) Q^T`` in the new basis.
                    of = zip(turns(state.bases[name], new), eigenvalues[name], strict=True)
                    found = [x.square() @ v for x, v in of]
                eigenvalues[name] = tuple(_floored(x, limit) for x in found)
        elif turn in evidence:
            bases = followed(statistics, bases, epsilon, sort=False)
        new = KLShampooState(statistics, bases, eigenvalues, mean, step, rest)
        return new, {k: direction[k] for k in grads}

    def needs(t: int) -> tuple[Need, ...]:
        return (*measure.due(t), *turn.due(t), *afresh.due(t))

    return in_blocks(Transform(init, update, needs), Blocking(merge, block, max_dim))


def whitened(
    g: Tensor, bases: tuple[Tensor, ...], roots: tuple[Tensor, ...], axes: tuple[int, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What each factor sees of a gradient that the others have whitened.

    Args:
        g: the gradient.
        bases, roots: Q_i and ``l_i^(-1/2)`` of its axes that have a factor.
        axes: those.

    Returns:
        (n_i, n_i) matrices, ``C_i(G ×_j S_j^(-1/2)) / Π n_j`` over the axes j other than i, and the
        diagonals of ``Q_i^T`` that ``Q_i``.
    """
    grams, magnitudes = [], []
    coordinates = None
    for i, axis in enumerate(axes):
        others = [j for j in range(len(axes)) if j != i]
        x = rotate(g, tuple(bases[j] for j in others), tuple(axes[j] for j in others))
        if coordinates is None:
            coordinates = mode_product(bases[i].mT, x, axis)
        scale = _along(tuple(roots[j] for j in others), tuple(axes[j] for j in others), g)
        count = g.numel() // g.shape[axis]
        grams.append(mode_gram(x * scale, axis) / count)
        squares = (coordinates * scale).square()
        magnitudes.append(squares.movedim(axis, 0).flatten(1).mean(1))
    return tuple(grams), tuple(magnitudes)


def _along(vectors: tuple[Tensor, ...], axes: tuple[int, ...], like: Tensor) -> Tensor:
    """The outer product of vectors along the axes of a tensor, to be broadcast."""
    product = torch.ones((), dtype=like.dtype, device=like.device)
    for v, axis in zip(vectors, axes, strict=True):
        product = product * v.reshape([-1 if i == axis else 1 for i in range(like.ndim)])
    return product


def _floored(eigenvalues: Tensor, limit: int) -> Tensor:
    return eigenvalues.clamp_min(max(10, min(eigenvalues.shape[-1], limit)) ** -2.0)


def _kept(first: str, begun: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return new if first == "identity" else torch.where(begun, new, old)


CARDS = (
    Card(
        "kl_shampoo",
        "KL-Shampoo (Lin 2026)",
        "(F̂_emp^batch)^½",
        "layer, KF-dim",
        "G direct, eigendecomposition",
        kl_shampoo,
        learning_rate=0.03,
        intervals=True,
        momentum=True,
    ),
)
