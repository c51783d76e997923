"""SOAP: Adam in the slowly turning eigenbasis of Shampoo's factors."""

from typing import Literal

import torch
from torch import Tensor

from funcprecond.checks import one_of
from funcprecond.evidence import Evidence
from funcprecond.linalg import treemath
from funcprecond.linalg.blocking import Blocking
from funcprecond.linalg.eigenbases import Bases, rotate, rotate_back, rotate_over, turned_squares
from funcprecond.linalg.precision import wide
from funcprecond.methods.card import card
from funcprecond.representation.average import accumulate
from funcprecond.solver.followed_eigenbases import FollowedEigenbases
from funcprecond.tracing import multi_tensor
from funcprecond.transform import Transform, counter
from funcprecond.transforms.in_blocks import in_blocks
from funcprecond.transforms.stored import stored
from funcprecond.tree import Params, map, state

__all__ = ["SOAPState", "soap"]


@state
class SOAPState:
    """What SOAP keeps, in float32 or wider.

    Attributes:
        statistics, bases: for each parameter a tuple of S_i and one of Q_i, by axis.
        mean, second_moment: m and v, shaped like the parameters, in rotated coordinates.
        plain_mean: m in the parameters' own coordinates, where bases turn at every step; then
            ``mean`` is empty, and otherwise this is.
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

    For a parameter with axes i longer than 1, Q_i the basis of its factor S_i, t counted from 1::

        G' = G ×_i Q_iᵀ
        m <- b1 m + (1 - b1) G'       v <- b2 v + (1 - b2) G'²
        d  = ( m / (sqrt(v) + damping) ×_i Q_i ) · sqrt(1 - b2^t) / (1 - b1^t)
        S_i <- bs S_i + (1 - bs) C_i(G)
        now and then  Q_i <- qr(S_i Q_i)

    The QR decomposition leaves each column in its place, so that v stays as it is, where the
    authors' code reorders both. The basis is turned after the step, so that no gradient is inside
    its own basis; m is turned with it. Vectors and scalars have no basis: they get Adam.

    Args:
        betas: the weights of the old mean and of the old second moment.
        damping: added to the root of v before the bias correction, as in the authors' code.
        decay: bs, the weight of the old statistics; b2 by default.
        first: the first step is Adam's ("identity"), or it is only used to find the first bases
            ("skip", the authors' code).
        refresh, epsilon: how bases are followed, see
            :class:`funcprecond.solver.followed_eigenbases.FollowedEigenbases`; the authors' code
            has an epsilon of 0. After a decomposition v is the diagonal of the old ``diag(v)`` in
            the new basis.
        merge, block: how parameters are cut into blocks, as for :func:`funcprecond.shampoo`.
        max_dim: a longer axis has no basis.
        every, refresh_every, start: the intervals of the statistics and of the bases.
        state_dtype, packed: how the state is kept, as for :func:`funcprecond.shampoo`.

    Returns:
        A method that needs the gradient only. It keeps 2 Σ n_i² numbers and two copies for a
        parameter; each step takes three products for each axis, each refresh three and a QR
        decomposition.

    Raises:
        ValueError: an option has a value that it cannot have.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.chain(fp.soap(refresh_every=10), fp.weight_decay(0.01), fp.scale(3e-3))
    """
    one_of(("identity", "skip"), first=first)
    b1, b2 = betas
    bs = b2 if decay is None else decay
    basis = FollowedEigenbases(every, refresh_every, start, refresh, epsilon, max_dim=max_dim)

    def init(params: Params) -> SOAPState:
        eyes, mean, v = basis.identities(params), *(treemath.zeros_like(params) for _ in range(2))
        means = ({}, mean) if refresh_every == 1 else (mean, {})
        return SOAPState(map(torch.zeros_like, eyes), eyes, *means, v, counter(params))

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
            bases, axes = state.bases[name], basis.axes(old.shape)
            g = grads[name].to(old.dtype)
            x = rotate(g, bases, axes)
            m = accumulate(old, x if state.mean else g, b1)
            v = accumulate(state.second_moment[name], x.square(), b2)
            d = _quotient(m if state.mean else rotate(m, bases, axes), v, damping, correction)
            if first == "skip":
                m, v = torch.where(begun, m, old), torch.where(begun, v, 0.0)
                d = torch.where(begun, d, 0.0)
            mean[name], second_moment[name] = m, v
            direction[name] = rotate_back(d, bases, axes).to(grads[name].dtype)
            statistics[name] = basis.statistics(state.statistics[name], g, bs, evidence)
        old, (new, how) = state.bases, basis.refreshed(statistics, state.bases, evidence)
        if how != "kept" and state.mean:
            mean = {k: rotate_over(m, old[k], new[k], basis.axes(m.shape)) for k, m in mean.items()}
        if how == "decomposed":
            second_moment = {
                k: turned_squares(v, old[k], new[k], basis.axes(v.shape))
                for k, v in second_moment.items()
            }
        means = (mean, {}) if state.mean else ({}, mean)
        state = SOAPState(statistics, new, *means, second_moment, step)
        return state, {k: direction[k] for k in grads}

    whole = in_blocks(Transform(init, update, basis.needs), Blocking(merge, block))
    return stored(whole, state_dtype, ("statistics",) if packed else ())


def _quotient(m: Tensor, v: Tensor, damping: float | Tensor, factor: Tensor) -> Tensor:
    """``m / (sqrt(v) + damping) * factor``."""
    d = v.sqrt()
    if isinstance(damping, Tensor) or not multi_tensor((m, v, factor)):
        return m / (d + damping) * factor
    return torch.div(m, d.add_(damping), out=d).mul_(factor)
