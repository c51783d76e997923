"""Adaptive K-FAC: the whole algorithm of the K-FAC paper, with no learning rate to choose."""

from typing import Any

import torch
from torch import Tensor

from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.curvature.objective import Objective
from funcprecond.curvature.quadratic_form import GGNForm
from funcprecond.evidence import Evidence, MissingEvidence
from funcprecond.layers.layer_call import Sharing
from funcprecond.linalg import treemath
from funcprecond.linalg.levenberg_marquardt import levenberg_marquardt, reduction_ratio
from funcprecond.linalg.quadratic_model import gram, least, least_in_plane
from funcprecond.losses.base import Labels
from funcprecond.methods.card import card
from funcprecond.need import Every, Need
from funcprecond.representation.average import Decay, RisingDecay, check_decay
from funcprecond.representation.kronecker_io import KroneckerIO
from funcprecond.solver.cholesky import Cholesky, CholeskyFactor
from funcprecond.transform import Transform
from funcprecond.tree import Params, state

__all__ = ["AdaptiveKFACState", "adaptive_kfac"]

PAPERS = RisingDecay(0.95)


@state
class AdaptiveKFACState:
    """K-FAC's factors and their inverses, the last step δ₀, and the two dampings.

    Attributes:
        representation, factor: as :func:`funcprecond.kfac` keeps them.
        step: δ₀, in float32 or wider.
        damping: λ of the quadratic model, 0-d.
        gamma: γ of the factors, 0-d.
    """

    representation: KroneckerIO
    factor: CholeskyFactor
    step: Params
    damping: Tensor
    gamma: Tensor


@card(
    "K-FAC, adaptive (Martens & Grosse 2015)",
    curvature="F̂_nmc; F for the length",
    representation="layer, KF-io",
    solver="L/G direct, Cholesky inverse",
    learning_rate=1.0,
    carries_momentum=True,
    options={"damping": 1.0},
)
def adaptive_kfac(
    *,
    damping: float | Tensor = 150.0,
    l2: float | Tensor = 0.0,
    labels: Labels = "mc",
    samples: int = 1,
    sharing: Sharing = "expand",
    decay: Decay = PAPERS,
    every: int = 1,
    refresh_every: int = 20,
    damping_every: int = 5,
    gamma_every: int = 20,
    start: int = 3,
) -> Transform:
    """The K-FAC paper's algorithm (Martens & Grosse, arXiv 1503.05671, sections 6 and 7).

    K-FAC gives a direction Δ; the step combines it with the last step δ₀ as the quadratic model of
    this batch says, whose curvature is the exact Fisher matrix F::

        Δ = -(B + γ/π I)^-1 [∇W | ∇b] (A + γ π I)^-1
        q(δ) = ∇ᵀδ + δᵀ (F + (λ + η) I) δ / 2
        δ = α Δ + μ δ₀,   (α, μ) = argmin q;   d = -δ
        every T₁:  ρ = (h(θ + δ) - h(θ)) / q(δ);  λ <- ω₁ λ if ρ > 3/4,  λ / ω₁ if ρ < 1/4
        every T₂:  γ <- the one of γ, ω₂ γ, γ / ω₂ whose q(δ) is least

    Args:
        damping: λ to start from, in the loss's units; γ starts from ``sqrt(λ + η)``. The paper's
            150 is for losses summed over hundreds of outputs.
        l2: η; ``η/2 |θ|²`` is added to what is minimised. The paper's is 1e-5.
        labels, samples, sharing: see :func:`funcprecond.kfac`.
        decay: of the factors, see :class:`funcprecond.RisingDecay`.
        every, refresh_every, start: the intervals of the factors and of their inverses, T₃.
        damping_every: λ's interval T₁, with ``ω₁ = 0.95^T₁``.
        gamma_every: γ's interval T₂, with ``ω₂ = 0.95^(T₂ / 2)``.

    Returns:
        A method whose learning rate is 1. It needs layer statistics, a push of Δ and δ₀ through the
        model (of four vectors every T₂) and a loss every T₁; it keeps what K-FAC keeps, and one
        copy of the parameters.

    Raises:
        ValueError: an interval or the decay is out of range.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.adaptive_kfac(damping=1.0)
    """
    check_decay(decay)
    curvature = LayerStatistics(labels, samples, sharing=sharing, tied=True)
    form, objective = GGNForm(), Objective()
    measure, refresh = Every("measure", every, start), Every("refresh", refresh_every, start)
    adapt, search = Every("damping", damping_every), Every("gamma", gamma_every)
    omega1, omega2 = 0.95**damping_every, 0.95 ** (gamma_every / 2)

    def init(params: Params) -> AdaptiveKFACState:
        rep, lam = KroneckerIO.init(params), treemath.scalar_like(params, damping)
        step = treemath.zeros_like(params)
        return AdaptiveKFACState(rep, Cholesky().init(rep), step, lam, (lam + l2).sqrt())

    def update(
        state: AdaptiveKFACState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[AdaptiveKFACState, Params]:
        if evidence is None:
            msg = f"adaptive_kfac needs {curvature} and more: pass the evidence of fp.observe"
            raise MissingEvidence(msg)
        here = {k: evidence.params[k].to(s.dtype) for k, s in state.step.items()}
        g = treemath.add(treemath.cast(grads, here), here, l2)
        rep, ridge = state.representation, state.damping + l2
        if measure in evidence:
            rep = rep.accumulate(evidence[curvature], decay)
        widths = (1.0, omega2, 1 / omega2) if search in evidence else (1.0,)
        due = refresh in evidence or search in evidence

        def attempt(gamma: Tensor) -> Any:
            solver = Cholesky(gamma.square(), "pi", invert=refresh_every > 4)
            factor = solver.prepare(rep, state.factor) if due else state.factor
            pair = [treemath.mul(solver.apply(factor, g), -1.0), state.step]
            model = evidence[form](pair) + ridge * gram(pair, pair)
            alpha, mu, value = least_in_plane(model, gram(pair, [g]).squeeze(-1))
            step = treemath.add(treemath.mul(pair[0], alpha), pair[1], mu)
            return value, gamma, factor, step

        value, gamma, factor, step = least([attempt(state.gamma * w) for w in widths])
        lam = state.damping
        if adapt in evidence:
            there = treemath.add(here, step)
            change = evidence[objective].loss_after(step) - evidence.loss
            change = change + l2 / 2 * (treemath.dot(there, there) - treemath.dot(here, here))
            ratio = reduction_ratio(change, value)
            # A gradient of zero predicts nothing, and tells nothing of the model.
            new = levenberg_marquardt(lam, ratio, up=1 / omega1, down=omega1)
            lam = torch.where(value == 0, lam, new)
        direction = {k: -x.to(grads[k].dtype) for k, x in step.items()}
        return AdaptiveKFACState(rep, factor, step, lam, gamma), direction

    def needs(t: int) -> tuple[Need, ...]:
        due = measure.due(t)
        wanted = (form, *((curvature,) if due else ()), *((objective,) if adapt.due(t) else ()))
        return (*wanted, *due, *refresh.due(t), *adapt.due(t), *search.due(t))

    return Transform(init, update, needs)
