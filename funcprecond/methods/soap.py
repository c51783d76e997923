"""SOAP: Adam in the slowly turning eigenbasis of Shampoo's factors.

Row: (F̂_emp^batch)^½; layer, KF-dim eigenbasis; division. Vyas et al., ICLR 2025, arXiv 2409.11321.
For a parameter with axes i longer than 1, Q_i the basis of its factor S_i, t counted from 1::

    G' = G ×_i Q_iᵀ
    m <- b1 m + (1 - b1) G'       v <- b2 v + (1 - b2) G'²
    d  = ( m / (sqrt(v) + damping) ×_i Q_i ) · sqrt(1 - b2^t) / (1 - b1^t)
    S_i <- bs S_i + (1 - bs) C_i(G)
    now and then  Q_i <- qr(S_i Q_i)

The QR decomposition takes the columns by descending diag(Q_iᵀ S_i Q_i) and leaves each in its
place, so v stays as it is, where the authors' code reorders both. The basis is turned after the
step, so no gradient is inside its own basis. m is kept in the rotated coordinates and turned with
the basis; where that is every step, it is cheaper kept in the parameter's own and rotated anew.
Vectors and scalars have no basis: Adam. Needs the gradient only; 2 Σ n_i² numbers and two copies a
parameter; each step three products an axis, each refresh three and a QR decomposition; five and
that if every step is one.
"""

import sys
from typing import Literal

import torch
from torch import Tensor

from funcprecond.evidence import Evidence
from funcprecond.linalg.axes import grams
from funcprecond.linalg.blocking import Blocking, in_blocks
from funcprecond.linalg.eigenbases import (
    Bases,
    axes_below,
    decomposed,
    followed,
    identities,
    rotate,
    rotate_back,
    rotate_over,
    turns,
)
from funcprecond.linalg.precision import factor_dtype, wide
from funcprecond.methods.table import Card
from funcprecond.need import Every, Need
from funcprecond.representation.average import accumulate
from funcprecond.tracing import multi_tensor
from funcprecond.transform import Transform, counter
from funcprecond.transforms.stored import stored
from funcprecond.tree import Params, state

__all__ = ["SOAPState", "soap"]


@state
class SOAPState:
    """What SOAP keeps, in float32 or wider.

    Attributes:
        statistics, bases: for each parameter a tuple of S_i and one of Q_i, one an axis.
        mean, second_moment: m and v, shaped like the parameters, in rotated coordinates.
        plain_mean: m in the parameters' own coordinates, where bases are to turn at every step;
            then ``mean`` is empty, and otherwise this is. A step goes by which one it finds.
        step: the number of updates.
    """

    statistics: Bases
    bases: Bases
    mean: Params
    plain_mean: Params
    second_moment: Params
    step: Tensor


def soap(
    *,
    betas: tuple[float | Tensor, float | Tensor] = (0.95, 0.95),
    damping: float | Tensor = 1e-8,
    decay: float | Tensor | None = None,
    first: Literal["identity", "skip"] = "identity",
    refresh: Literal["qr", "eigh"] = "qr",
    epsilon: float | Tensor = 1e-6,
    merge: int = 0,
    block: int = 0,
    max_dim: int = 10000,
    every: int = 1,
    refresh_every: int = 10,
    start: int = 0,
    state_dtype: torch.dtype | None = None,
    packed: bool = False,
) -> Transform:
    """SOAP's direction.

    Args:
        betas: the weights of the old mean and of the old second moment.
        damping: added to the root of v before the bias correction, as in the authors' code.
        decay: bs, the weight of the old statistics; b2 by default.
        first: the first step is Adam's ("identity"), or it is only used to find the first bases
            ("skip", the authors' code).
        refresh: how bases are followed. The first ones, those before ``start``, and all of an
            ``update`` without evidence come from a full decomposition ("eigh") in any case. After
            it v is the diagonal of the old ``diag(v)`` in the new basis; after "qr" it stays.
        epsilon: the QR step's shift, see :func:`funcprecond.linalg.eigenbases.orthogonal_step`; 0
            in the authors' code.
        merge, block: how parameters are cut into blocks, see
            :class:`funcprecond.linalg.blocking.Blocking`; by default they are whole.
        max_dim: a longer axis has no basis.
        every, refresh_every, start: the intervals of the statistics and of the bases, see
            :func:`funcprecond.composition`.
        state_dtype, packed: how the state is kept, see
            :func:`funcprecond.transforms.stored.stored`.
    """
    b1, b2 = betas
    bs = b2 if decay is None else decay
    measure, turn = Every("measure", every, start), Every("refresh", refresh_every, start)
    afresh = Every("decompose", refresh_every if refresh == "eigh" else sys.maxsize, start)

    def init(params: Params) -> SOAPState:
        axes = {k: axes_below(p.shape, max_dim) for k, p in params.items()}
        dtypes = {k: factor_dtype(p) for k, p in params.items()}
        eyes = {k: identities(p, axes[k], dtypes[k]) for k, p in params.items()}
        mean = {k: torch.zeros_like(p, dtype=dtypes[k]) for k, p in params.items()}
        return SOAPState(
            {k: tuple(torch.zeros_like(x) for x in e) for k, e in eyes.items()},
            eyes,
            *(({}, mean) if refresh_every == 1 else (mean, {})),
            {k: torch.zeros_like(p, dtype=dtypes[k]) for k, p in params.items()},
            counter(params),
        )

    def update(
        state: SOAPState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[SOAPState, Params]:
        step = state.step + 1
        begun = step > 1
        # Wide, as in adam: in float32 the first correction is off by 1e-5.
        t = wide((step - 1).clamp_min(1) if first == "skip" else step)
        correction = (1 - b2**t) ** 0.5 / (1 - b1**t)
        statistics, mean, second_moment, direction = {}, {}, {}, {}
        for name, old in (state.mean or state.plain_mean).items():
            bases, axes = state.bases[name], axes_below(old.shape, max_dim)
            g = grads[name].to(old.dtype)
            x = rotate(g, bases, axes)
            m = accumulate(old, x if state.mean else g, b1)
            v = accumulate(state.second_moment[name], x.square(), b2)
            y = m if state.mean else rotate(m, bases, axes)
            d = _quotient(y, v, damping, correction)
            if first == "skip":
                m, v = torch.where(begun, m, old), torch.where(begun, v, 0.0)
                d = torch.where(begun, d, 0.0)
            mean[name], second_moment[name] = m, v
            direction[name] = rotate_back(d, bases, axes).to(grads[name].dtype)
            factors = state.statistics[name]
            if evidence is None or measure in evidence:
                found = zip(factors, grams(g, axes), strict=True)
                factors = tuple(accumulate(s, c, bs) for s, c in found)
            statistics[name] = factors
        means = (mean, {}) if state.mean else ({}, mean)
        new = SOAPState(statistics, state.bases, *means, second_moment, step)
        if evidence is None or afresh in evidence:
            new = _turned(new, decomposed(statistics, state.bases), max_dim, anew=True)
        elif turn in evidence:
            new = _turned(new, followed(statistics, state.bases, epsilon), max_dim, anew=False)
        return new, {k: direction[k] for k in grads}

    def needs(t: int) -> tuple[Need, ...]:
        return (*measure.due(t), *turn.due(t), *afresh.due(t))

    whole = in_blocks(Transform(init, update, needs), Blocking(merge, block))
    return stored(whole, state_dtype, ("statistics",) if packed else ())


def _quotient(m: Tensor, v: Tensor, damping: float | Tensor, factor: Tensor) -> Tensor:
    """``m / (sqrt(v) + damping) * factor``."""
    d = v.sqrt()
    if isinstance(damping, Tensor) or not multi_tensor((m, v, factor)):
        return m / (d + damping) * factor
    return torch.div(m, d.add_(damping), out=d).mul_(factor)


def _turned(state: SOAPState, bases: Bases, max_dim: int, *, anew: bool) -> SOAPState:
    """The state in other bases: their columns have no counterparts among the old, or take over."""
    mean, second_moment = {}, {}
    for name, v in state.second_moment.items():
        old, new = state.bases[name], bases[name]
        axes = axes_below(v.shape, max_dim)
        if name in state.mean:
            mean[name] = rotate_over(state.mean[name], old, new, axes)
        if anew:
            v = rotate_back(v, tuple(x.square() for x in turns(old, new)), axes)
        second_moment[name] = v
    return SOAPState(state.statistics, bases, mean, state.plain_mean, second_moment, state.step)


CARDS = (
    Card(
        "soap",
        "SOAP (Vyas 2025)",
        "(F̂_emp^batch)^½",
        "layer, KF-dim eigenbasis",
        "G direct, division",
        soap,
        learning_rate=1e-2,
        intervals=True,
        momentum=True,
    ),
)
