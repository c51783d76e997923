"""Adaptive K-FAC: the paper's full algorithm, which chooses its own learning rate and momentum."""

from typing import Any

from torch import Tensor

from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.curvature.objective import Objective
from funcprecond.curvature.quadratic_form import GGNForm
from funcprecond.evidence import Evidence, is_due, required
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
from funcprecond.transform import Transform, fitted
from funcprecond.tree import Params, state

__all__ = ["AdaptiveKFACState", "adaptive_kfac"]


@state
class AdaptiveKFACState:
    """The state of adaptive K-FAC.

    Attributes:
        representation, factor: K-FAC's factors, and their damped inverses.
        step: δ₀, the last step, in float32 or wider.
        damping, gamma: λ of the quadratic model, and γ of the factors; 0-d tensors.
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
    decay: Decay = RisingDecay(0.95),  # noqa: B008 - immutable
    every: int = 1,
    refresh_every: int = 20,
    damping_every: int = 5,
    gamma_every: int = 20,
    start: int = 3,
) -> Transform:
    """K-FAC with adaptive damping (Martens & Grosse, arXiv 1503.05671, sections 6 and 7).

    K-FAC proposes a direction Δ. The step δ combines it with the last step δ₀ so that a quadratic
    model q of the loss on this batch is least. The model uses the exact Fisher matrix F, and so
    chooses the learning rate α and the momentum μ::

        Δ = -(B + γ/π I)^-1 [∇W | ∇b] (A + γ π I)^-1
        q(δ) = ∇ᵀδ + δᵀ (F + (λ + η) I) δ / 2
        δ = α Δ + μ δ₀,   (α, μ) = argmin q;   d = -δ
        every T₁:  ρ = (h(θ + δ) - h(θ)) / q(δ);  λ <- ω₁ λ if ρ > 3/4,  λ / ω₁ if ρ < 1/4
        every T₂:  γ <- the one of γ, ω₂ γ, γ / ω₂ whose q(δ) is least

    Args:
        damping: the initial λ, in units of the loss; γ starts at ``sqrt(λ + η)``. The paper's 150
            is for losses that are summed over hundreds of outputs.
        l2: η, the weight of the penalty ``η/2 |θ|²`` that is added to the loss; 1e-5 in the paper.
        labels, samples, sharing: see :func:`funcprecond.kfac`.
        decay: the weight of the old factors, see :class:`funcprecond.RisingDecay`.
        every, refresh_every, start: the intervals of the factors and of their inverses (T₃), in
            steps, see :func:`funcprecond.compose`.
        damping_every, gamma_every: T₁ and T₂, with ``ω₁ = 0.95^T₁`` and ``ω₂ = 0.95^(T₂ / 2)``.

    Returns:
        A method whose learning rate is 1. Beside K-FAC's measurements it costs two forward-mode
        products with the model at each step (four every T₂) and one loss every T₁. Its state is
        K-FAC's and one more copy of the parameters.

    Raises:
        ValueError: an interval or the decay is out of range.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.adaptive_kfac(damping=1.0)    # no fp.scale: the method chooses the length
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
        evidence = required(evidence, form, curvature)
        here = treemath.cast(evidence.params, state.step)
        g = treemath.add(treemath.cast(grads, here), here, l2)
        rep, ridge = state.representation, state.damping + l2
        if is_due(measure, evidence, curvature):
            rep = rep.accumulate(evidence[curvature], decay)
        widths = (1.0, omega2, 1 / omega2) if is_due(search, evidence) else (1.0,)
        due = is_due(refresh, evidence) or rep.blocks != state.representation.blocks

        def attempt(gamma: Tensor) -> Any:
            solver = Cholesky(gamma.square(), "pi", invert=refresh_every > 4)
            factor = solver.prepare(rep, state.factor) if due or widths[1:] else state.factor
            pair = [treemath.mul(solver.apply(factor, g), -1.0), state.step]
            model = evidence[form](pair) + ridge * gram(pair, pair)
            alpha, mu, value = least_in_plane(model, gram(pair, [g]).squeeze(-1))
            step = treemath.add(treemath.mul(pair[0], alpha), pair[1], mu)
            return value, gamma, factor, step

        value, gamma, factor, step = least([attempt(state.gamma * w) for w in widths])
        lam = state.damping
        if is_due(adapt, evidence):
            there = treemath.add(here, step)
            change = evidence[objective].loss_after(step) - evidence.loss
            change = change + l2 / 2 * (treemath.dot(there, there) - treemath.dot(here, here))
            ratio = reduction_ratio(change, value)
            lam = levenberg_marquardt(lam, ratio, up=1 / omega1, down=omega1)
        direction = treemath.cast(treemath.mul(step, -1.0), grads)
        return AdaptiveKFACState(rep, factor, step, lam, gamma), direction

    def needs(t: int) -> tuple[Need, ...]:
        due, marks = measure.due(t), (x.marks(t) for x in (measure, refresh, adapt, search))
        wanted = (form, *((curvature,) if due else ()), *((objective,) if adapt.due(t) else ()))
        return (*wanted, *(n for of_one in marks for n in of_one))

    return fitted(Transform(init, update, needs), lambda state: state.step)
