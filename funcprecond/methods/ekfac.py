"""EKFAC: K-FAC's eigenbasis with the exact second moments along its axes.

Row: F̂_nmc, F̂_emp; layer, KF-io; eigendecomposition. George et al., arXiv 1806.03884. With Ub, Ua
the eigenvectors of K-FAC's factors B and A, and G_n the gradient of example n in ``[W | b]``::

    s = c Σ_n (Ubᵀ G_n Ua)²          entry by entry, summed over positions before squaring
    d = Ub ( (Ubᵀ [∇W | ∇b] Ua) / (s + λ) ) Uaᵀ

s is the best diagonal in that basis, so the approximation is never worse than K-FAC's. Needs layer
statistics that tell the examples apart. K-FAC's memory and one more copy of the parameters; the
bases are refreshed now and then, s at every measurement.
"""

import torch
from torch import Tensor

from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.evidence import Evidence, MissingEvidence
from funcprecond.layers.blocks import Layers, split_block
from funcprecond.losses.base import Labels
from funcprecond.methods.table import Card
from funcprecond.need import Every
from funcprecond.representation import average
from funcprecond.representation.average import Decay, check_decay
from funcprecond.representation.kronecker_io import KroneckerIO
from funcprecond.solver.eigen import eigenbases, groups_of, rotate, rotate_back
from funcprecond.solver.layer_gradient import (
    GRADIENT_ROWS,
    BlockShape,
    LayerGradient,
    apply_blocks,
    gradient_rows,
    unit_inverses,
)
from funcprecond.transform import Transform
from funcprecond.tree import Params, state

__all__ = ["EKFACState", "ekfac"]


@state
class EKFACState:
    """What EKFAC keeps; all but ``factors`` by block, empty until the first measurement.

    Attributes:
        factors: K-FAC's.
        left, right: the eigenvectors; an embedding has no left ones.
        moments: (o, i + 1), totals of s; divided by ``weight`` the second moments.
        weight: 0-d, restarts when the bases are refreshed.
    """

    factors: KroneckerIO
    left: dict[str, Tensor]
    right: dict[str, Tensor]
    moments: dict[str, Tensor]
    weight: Tensor


def ekfac(
    *,
    damping: float | Tensor = 1e-3,
    labels: Labels = "mc",
    samples: int = 1,
    decay: Decay = 0.95,
    every: int = 1,
    refresh_every: int = 50,
    start: int = 10,
) -> Transform:
    """EKFAC's direction.

    Args:
        damping: λ, added to the second moments, in the loss's units.
        labels, samples: as for :func:`funcprecond.kfac`.
        decay: of the factors and the second moments: None for the newest batch alone, or the weight
            of the old value. After a refresh the moments start anew: they are numbers in the basis.
        every, refresh_every, start: the intervals of the measurement and of the bases, see
            :func:`funcprecond.composition`. A refresh needs a measurement: ``refresh_every`` must be a
            multiple of ``every``.
    """
    check_decay(decay)
    if refresh_every % every:
        msg = f"refresh_every={refresh_every} must be a multiple of every={every}"
        raise ValueError(msg)
    curvature = LayerStatistics(labels, samples, per_sample=True)
    measure, refresh = Every("measure", every, start), Every("refresh", refresh_every, start)

    def init(params: Params) -> EKFACState:
        factors = KroneckerIO.init(params)
        return EKFACState(factors, {}, {}, {}, factors.weight.clone())

    def update(
        state: EKFACState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[EKFACState, Params]:
        if evidence is None:
            msg = f"ekfac needs {curvature} too: pass the evidence of fp.observe to update"
            raise MissingEvidence(msg)
        if measure in evidence:
            layers = evidence[curvature].restrict(state.factors.names)
            state = _measured(state, layers, decay, refresh in evidence)
        w = state.factors.weight

        def solve(block: str, gradient: LayerGradient) -> LayerGradient:
            left, right = state.left.get(block), state.right[block]
            moments = state.moments[block] / state.weight
            return rotate_back(rotate(gradient, left, right) / (moments + damping), left, right)

        direction = apply_blocks(
            grads,
            {
                k: BlockShape(groups_of(x), state.moments[k].shape[-2])
                for k, x in state.right.items()
            },
            solve,
            unit_inverses({k: x / w for k, x in state.factors.units.items()}, damping),
            {k: x / w for k, x in state.factors.others.items()},
            damping,
            gradient_rows(grads, evidence),
        )
        return state, direction

    def needs(t: int) -> tuple:
        due = measure.due(t)
        return (GRADIENT_ROWS, *((curvature,) if due else ()), *due, *refresh.due(t))

    return Transform(init, update, needs)


def _measured(state: EKFACState, layers: Layers, decay: Decay, refresh: bool) -> EKFACState:
    factors = state.factors.accumulate(layers, decay)
    left, right, moments, old_weight = state.left, state.right, state.moments, state.weight
    if refresh:
        _, left = eigenbases({k: x for k, x in factors.left.items()})
        _, right = eigenbases({k: x for k, x in factors.right.items()})
        moments, old_weight = {}, torch.zeros_like(old_weight)
    new = {
        k: uses[0].call.second_moments(uses, split_block(k)[1] is not None, left.get(k), right[k])
        * layers.scale
        for k, uses in layers.uses.items()
        if k in right
    }
    at = average.at(old_weight, decay)
    moments = {k: average.accumulate(moments.get(k), x, at) for k, x in new.items()}
    return EKFACState(factors, left, right, moments, average.weight(old_weight, at))


CARDS = (
    Card(
        "ekfac",
        "EKFAC (George 2018)",
        "F̂_nmc, F̂_emp",
        "layer, KF-io",
        "L/G direct, eigendecomposition",
        ekfac,
        learning_rate=0.03,
        intervals=True,
        options={"damping": 0.1},
    ),
)
