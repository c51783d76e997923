"""SPlus: the signs of the momentum in the eigenbasis of Shampoo's factors.

Row: (F̂_emp^batch)^½; layer, KF-dim eigenbasis; sign. Frans, Levine & Abbeel, arXiv 2506.07254.
For a parameter with k axes longer than 1, of n_i entries, Q_i the basis of its factor S_i::

    m <- b1 m + (1 - b1) G
    d  = k / (Σ n_i) · sign(m ×_i Q_iᵀ) ×_i Q_i        2 / (n_1 + n_2) for a matrix
    S_i <- b2 S_i + (1 - b2) C_i(G)
    now and then  Q_i <- eigenvectors of S_i

The bases are turned after the step. Eigenvalues are not used: the sign is what dividing by the
current magnitudes gives, and the direction's length depends on the shape alone. Vectors and scalars
get ``0.001 sign(m)``. Needs the gradient only; 2 Σ n_i² numbers and one copy a parameter; each step
three products an axis, each refresh a decomposition.

The authors train at a high learning rate and evaluate at a running mean of the weights (of rate
0.999), which is the training loop's.
"""

import torch
from torch import Tensor

from funcprecond.evidence import Evidence
from funcprecond.linalg.axes import grams
from funcprecond.linalg.blocking import Blocking, in_blocks
from funcprecond.linalg.eigenbases import (
    Bases,
    axes_below,
    decomposed,
    identities,
    rotate,
    rotate_back,
)
from funcprecond.linalg.precision import factor_dtype
from funcprecond.methods.table import Card
from funcprecond.need import Every, Need
from funcprecond.representation.average import accumulate
from funcprecond.representation.kronecker_dim import axes_of
from funcprecond.transform import Transform
from funcprecond.tree import Params, state

__all__ = ["SPlusState", "splus"]

# The authors' learning rate of vectors over that of matrices.
VECTOR = 1e-3
# Entries below this many roundings of the length have no sign.
ROUNDINGS = 4


@state
class SPlusState:
    """What SPlus keeps, in float32 or wider.

    Attributes:
        mean: m, shaped like the parameters.
        statistics, bases: for each parameter a tuple of S_i and one of Q_i, one an axis.
    """

    mean: Params
    statistics: Bases
    bases: Bases


def splus(
    *,
    momentum: float | Tensor = 0.9,
    decay: float | Tensor = 0.999,
    merge: int = 0,
    block: int = 0,
    max_dim: int = 10000,
    every: int = 1,
    refresh_every: int = 100,
    start: int = 0,
) -> Transform:
    """SPlus's direction.

    Args:
        momentum: b1, the weight of the old mean.
        decay: b2, the weight of the old statistics.
        merge, block: how parameters are cut into blocks, see
            :class:`funcprecond.linalg.blocking.Blocking`; by default they are whole.
        max_dim: a longer axis has no basis: the sign is taken along it as it is.
        every, refresh_every, start: the intervals of the statistics and of the bases, see
            :func:`funcprecond.composition`. The first step, before any basis, is sign descent.
    """
    measure, refresh = Every("measure", every, start), Every("refresh", refresh_every, start)

    def init(params: Params) -> SPlusState:
        eyes = {
            k: identities(p, axes_below(p.shape, max_dim), factor_dtype(p))
            for k, p in params.items()
        }
        return SPlusState(
            {k: torch.zeros_like(p, dtype=factor_dtype(p)) for k, p in params.items()},
            {k: tuple(torch.zeros_like(x) for x in e) for k, e in eyes.items()},
            eyes,
        )

    def update(
        state: SPlusState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[SPlusState, Params]:
        mean, statistics, direction = {}, {}, {}
        for name, old in state.mean.items():
            bases, axes = state.bases[name], axes_below(old.shape, max_dim)
            g = grads[name].to(old.dtype)
            mean[name] = accumulate(old, g, momentum)
            signs = _sign(rotate(mean[name], bases, axes))
            d = _scale(old.shape) * rotate_back(signs, bases, axes)
            direction[name] = d.to(grads[name].dtype)
            factors = state.statistics[name]
            if evidence is None or measure in evidence:
                found = zip(factors, grams(g, axes), strict=True)
                factors = tuple(accumulate(s, c, decay) for s, c in found)
            statistics[name] = factors
        bases = state.bases
        if evidence is None or refresh in evidence:
            bases = decomposed(statistics, bases)
        return SPlusState(mean, statistics, bases), {k: direction[k] for k in grads}

    def needs(t: int) -> tuple[Need, ...]:
        return (*measure.due(t), *refresh.due(t))

    return in_blocks(Transform(init, update, needs), Blocking(merge, block))


def _sign(x: Tensor) -> Tensor:
    """The sign, 0 where x is rounding: a direction without a gradient must not get a full step."""
    rounding = ROUNDINGS * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(x)
    return torch.where(x.abs() > rounding, x.sign(), 0.0)


def _scale(shape: torch.Size) -> float:
    axes = axes_of(shape)
    return len(axes) / sum(shape[i] for i in axes) if axes else VECTOR


CARDS = (
    Card(
        "splus",
        "SPlus (Frans 2025)",
        "(F̂_emp^batch)^½",
        "layer, KF-dim eigenbasis",
        "G direct, sign",
        splus,
        learning_rate=0.2,
        intervals=True,
        momentum=True,
    ),
)
