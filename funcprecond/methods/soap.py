"""SOAP: Adam in the eigenbasis of Shampoo's factors, which changes slowly."""

from typing import Literal

import torch
from torch import Tensor

from funcprecond.checks import one_of
from funcprecond.evidence import Evidence
from funcprecond.linalg import treemath
from funcprecond.linalg.adam_step import quotient
from funcprecond.linalg.blocking import Blocking
from funcprecond.linalg.eigenbases import Bases, rotate, rotate_back, rotate_over, turned_squares
from funcprecond.linalg.precision import wide
from funcprecond.methods.card import card
from funcprecond.representation.average import accumulate
from funcprecond.solver.followed_eigenbases import FollowedEigenbases
from funcprecond.transform import Transform, counter, fitted
from funcprecond.transforms.in_blocks import in_blocks
from funcprecond.transforms.stored import stored
from funcprecond.tree import Params, map, state

__all__ = ["SOAPState", "soap"]


@state
class SOAPState:
    """The state of SOAP, in float32 or wider.

    Attributes:
        statistics, bases: for each parameter, a tuple of S_i and a tuple of Q_i, one for each axis.
        mean, second_moment: m and v in the bases' coordinates, shaped like the parameters.
        plain_mean: m in the parameters' coordinates, for bases that change at every step. One of
            this and ``mean`` is empty.
        step: the number of updates.
    """

    statistics: Bases
    bases: Bases
    mean: Params
    plain_mean: Params
    second_moment: Params
    step: Tensor


@card(
    "SOAP (Vyas 2025)",
    curvature="(F̂_emp^batch)^½",
    representation="layer, KF-dim eigenbasis",
    solver="G direct, division",
    learning_rate=1e-2,
    carries_momentum=True,
)
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
    """SOAP (Vyas et al., ICLR 2025, arXiv 2409.11321).

    SOAP runs Adam in the eigenbasis of Shampoo's factors. For a parameter whose axes i are longer
    than 1, with Q_i the basis of the factor S_i, and t counted from 1::

        G' = G ×_i Q_iᵀ
        m <- b1 m + (1 - b1) G'       v <- b2 v + (1 - b2) G'²
        d  = ( m / (sqrt(v) + damping) ×_i Q_i ) · sqrt(1 - b2^t) / (1 - b1^t)
        S_i <- bs S_i + (1 - bs) C_i(G)
        at each refresh  Q_i <- qr(S_i Q_i)

    where C_i(G) is the Gram matrix of G's slices along axis i. The bases change after the step, so
    that no gradient influences its own basis, and m moves along. The QR decomposition keeps the
    order of the columns, so that v needs no change (the authors' code sorts both). Vectors and
    scalars get Adam.

    Args:
        betas: (b1, b2), the weights of the old mean and of the old second moment.
        damping: added to the root of v before the bias correction, as in the authors' code.
        decay: bs, the weight of the old statistics; None means b2.
        first: "identity" makes the first step with ``Q_i = I``, as Adam; "skip" only finds the
            first bases and returns a zero direction, as in the authors' code.
        refresh, epsilon: how the bases follow the statistics, see
            :class:`funcprecond.solver.FollowedEigenbases`; the authors' code has an epsilon of 0.
            After "eigh", v is the diagonal of the old ``diag(v)`` in the new basis.
        merge, block, max_dim: as for :func:`funcprecond.shampoo`.
        every, refresh_every, start: the intervals of the statistics and of the bases, in steps.
        state_dtype, packed: how the state is stored, as for :func:`funcprecond.shampoo`.

    Returns:
        A method that needs the gradient only. Its state is 2 Σ n_i² numbers and two copies of each
        parameter. A step takes three products for each axis, a refresh three more and a QR.

    Raises:
        ValueError: an option has a value that is not allowed.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.chain(fp.soap(refresh_every=10), fp.weight_decay(0.01), fp.scale(3e-3))
    """
    one_of(("identity", "skip"), first=first)
    (b1, b2), bs = betas, betas[1] if decay is None else decay
    basis = FollowedEigenbases(every, refresh_every, start, refresh, epsilon, max_dim=max_dim)

    def init(params: Params) -> SOAPState:
        eyes, mean, v = basis.identities(params), *(treemath.zeros_like(params) for _ in range(2))
        means = ({}, mean) if refresh_every == 1 else (mean, {})
        return SOAPState(map(torch.zeros_like, eyes), eyes, *means, v, counter(params))

    def update(
        state: SOAPState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[SOAPState, Params]:
        step = state.step + 1
        # In float64, because in float32 the first correction would be off by 1e-5.
        t = wide((step - 1).clamp_min(1) if first == "skip" else step)
        correction = (1 - b2**t) ** 0.5 / (1 - b1**t)
        statistics, mean, squares, direction = {}, {}, {}, {}
        for name, old in (state.mean or state.plain_mean).items():
            bases, axes = state.bases[name], basis.axes(old.shape)
            g = grads[name].to(old.dtype)
            x = rotate(g, bases, axes)
            m = accumulate(old, x if state.mean else g, b1)
            v = accumulate(state.second_moment[name], x.square(), b2)
            d = quotient(m if state.mean else rotate(m, bases, axes), v, damping, correction)
            if first == "skip":
                m = torch.where(step > 1, m, old)
                v, d = torch.where(step > 1, v, 0.0), torch.where(step > 1, d, 0.0)
            mean[name], squares[name], direction[name] = m, v, rotate_back(d, bases, axes)
            statistics[name] = basis.statistics(state.statistics[name], g, bs, evidence)
        old, (new, how) = state.bases, basis.refreshed(statistics, state.bases, evidence)
        if how != "kept" and state.mean:
            mean = {k: rotate_over(m, old[k], new[k], basis.axes(m.shape)) for k, m in mean.items()}
        for k, v in squares.items() if how == "decomposed" else ():
            squares[k] = turned_squares(v, old[k], new[k], basis.axes(v.shape))
        means = (mean, {}) if state.mean else ({}, mean)
        return SOAPState(statistics, new, *means, squares, step), treemath.cast(direction, grads)

    inner = fitted(Transform(init, update, basis.needs), lambda state: state.second_moment)
    whole = in_blocks(inner, Blocking(merge, block))
    return stored(whole, state_dtype, ("statistics",) if packed else ())
