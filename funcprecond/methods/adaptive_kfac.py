"""Adaptive K-FAC: the whole algorithm of the K-FAC paper, with no learning rate to choose.

Row: F̂_nmc, with exact F for lengths; layer, KF-io; Cholesky inverse. Martens & Grosse, arXiv
1503.05671, sections 6 and 7. K-FAC gives a direction Δ; the step combines it with the last step δ₀
as the quadratic model of this batch says, whose curvature is the exact Fisher matrix::

    Δ = -(B + γ/π I)^-1 [∇W | ∇b] (A + γ π I)^-1
    q(δ) = ∇ᵀδ + δᵀ (F + (λ + η) I) δ / 2
    δ = α Δ + μ δ₀,   (α, μ) = argmin q;   d = -δ
    every T₁:  ρ = (h(θ + δ) - h(θ)) / q(δ);  λ <- ω₁ λ if ρ > 3/4,  λ / ω₁ if ρ < 1/4
    every T₂:  γ <- the one of γ, ω₂ γ, γ / ω₂ whose q(δ) is least

Needs layer statistics, a push of Δ and δ₀ through the model (of four vectors every T₂), and a loss
every T₁. State: that of K-FAC, one copy of the parameters, λ and γ. The learning rate is 1.
"""

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.curvature.objective import Objective
from funcprecond.curvature.quadratic_form import GGNForm
from funcprecond.evidence import Evidence, MissingEvidence
from funcprecond.layers.kinds.base import Sharing
from funcprecond.linalg import treemath
from funcprecond.linalg.levenberg_marquardt import levenberg_marquardt, reduction_ratio
from funcprecond.linalg.precision import factor_dtype
from funcprecond.losses.base import Labels
from funcprecond.methods.table import Card
from funcprecond.need import Every
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


@state
class _Attempt:
    value: Tensor
    gamma: Tensor
    factor: CholeskyFactor
    step: Params


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
    """The step of the K-FAC paper, as a direction for the learning rate 1.

    Args:
        damping: λ to start from, in the loss's units; γ starts from ``sqrt(λ + η)``. The paper's
            150 is for losses summed over hundreds of outputs.
        l2: η; ``η/2 |θ|²`` is added to what is minimised. The paper's is 1e-5.
        labels, samples, sharing: see :func:`funcprecond.kfac`.
        decay: of the factors, see :class:`funcprecond.RisingDecay`.
        every: the factors' interval.
        refresh_every: the inverses' interval, T₃.
        damping_every: λ's interval T₁, with ``ω₁ = 0.95^T₁``.
        gamma_every: γ's interval T₂, with ``ω₂ = 0.95^(T₂ / 2)``.
        start: before this step factors and inverses are always due.

    Raises:
        ValueError: an interval or the decay is out of range.
    """
    check_decay(decay)
    curvature = LayerStatistics(labels, samples, sharing=sharing, tied=True)
    form, objective = GGNForm(), Objective()
    measure, refresh = Every("measure", every, start), Every("refresh", refresh_every, start)
    adapt, search = Every("damping", damping_every), Every("gamma", gamma_every)
    omega1, omega2 = 0.95**damping_every, 0.95 ** (gamma_every / 2)

    def init(params: Params) -> AdaptiveKFACState:
        rep = KroneckerIO.init(params)
        step = {k: torch.zeros_like(p, dtype=factor_dtype(p)) for k, p in params.items()}
        lam = torch.zeros_like(rep.weight) + damping
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

        def attempt(gamma: Tensor) -> _Attempt:
            solver = Cholesky(gamma.square(), "pi", invert=refresh_every > 4)
            factor = solver.prepare(rep, state.factor) if due else state.factor
            vectors = [treemath.mul(solver.apply(factor, g), -1.0), state.step]
            alpha, mu, value = _least(
                evidence[form](vectors) + ridge * _gram(vectors, vectors),
                _gram(vectors, [g]).squeeze(-1),
            )
            step = treemath.add(treemath.mul(vectors[0], alpha), vectors[1], mu)
            return _Attempt(value, gamma, factor, step)

        best = _best([attempt(state.gamma * w) for w in widths])
        lam = follow(state.damping, here, best, evidence) if adapt in evidence else state.damping
        direction = {k: -x.to(grads[k].dtype) for k, x in best.step.items()}
        return AdaptiveKFACState(rep, best.factor, best.step, lam, best.gamma), direction

    def follow(lam: Tensor, here: Params, best: "_Attempt", evidence: Evidence) -> Tensor:
        there = treemath.add(here, best.step)
        moved = {k: p.to(evidence.params[k].dtype) for k, p in there.items()}
        change = evidence[objective].loss({**evidence.params, **moved}) - evidence.loss
        change = change + l2 / 2 * (treemath.dot(there, there) - treemath.dot(here, here))
        ratio = reduction_ratio(change, best.value)
        new = levenberg_marquardt(lam, ratio, up=1 / omega1, down=omega1)
        # A gradient of zero predicts nothing, and tells nothing of the model.
        return torch.where(best.value == 0, lam, new)

    def needs(t: int) -> tuple:
        due = measure.due(t)
        wanted = (form, *((curvature,) if due else ()), *((objective,) if adapt.due(t) else ()))
        return (*wanted, *due, *refresh.due(t), *adapt.due(t), *search.due(t))

    return Transform(init, update, needs)


def _least(model: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """α, μ and the value where ``cᵀ model c / 2 + slopesᵀ c`` is least, c = (α, μ).

    The second direction counts only if it is another than the first, as far as the dtype can tell;
    at the first step it is zero.
    """
    a, b, c = model[0, 0], model[0, 1], model[1, 1]
    determinant = a * c - b * b
    two = determinant > 10 * torch.finfo(model.dtype).eps * a * c
    safe, first = torch.where(two, determinant, 1), torch.where(a > 0, a, 1)
    alpha = torch.where(two, (b * slopes[1] - c * slopes[0]) / safe, -slopes[0] / first)
    mu = torch.where(two, (b * slopes[0] - a * slopes[1]) / safe, 0)
    # At the least point the quadratic term is half of the linear one, with the other sign.
    return alpha, mu, (alpha * slopes[0] + mu * slopes[1]) / 2


def _best(attempts: list[_Attempt]) -> _Attempt:
    """The one of least value; a NaN is worse than any."""
    best = attempts[0]
    for other in attempts[1:]:
        better = (other.value < best.value) | best.value.isnan()
        best = tree.map(lambda x, y, c=better: torch.where(c, x, y), other, best)
    return best


def _gram(xs: list[Params], ys: list[Params]) -> Tensor:
    return torch.stack([torch.stack([treemath.dot(x, y) for y in ys]) for x in xs])


CARDS = (
    Card(
        "adaptive_kfac",
        "K-FAC, adaptive (Martens & Grosse 2015)",
        "F̂_nmc; F for the length",
        "layer, KF-io",
        "L/G direct, Cholesky inverse",
        adaptive_kfac,
        learning_rate=1.0,
        intervals=True,
        momentum=True,
        options={"damping": 1.0},
    ),
)
