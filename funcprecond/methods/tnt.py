"""TNT: natural gradient under a tensor normal model of the gradient at sampled labels.

Row: F̂_nmc, F̂_emp; layer, KF-dim; Cholesky inverse. Ren & Goldfarb, NeurIPS 2021, arXiv 2106.02925
(the "same trace" variant of the authors' code). For a parameter of N entries with k axes longer
than 1, of n_i entries, and D the gradient of the mini-batch's loss at labels y ~ p(y|x)::

    H_i <- β H_i + (1 - β) C_i(D)
    c    = (tr(H_1) / N)^(1/k)
    U_i  = H_i / (c^(k-1) Π_{j≠i} n_j)                 of mean eigenvalue c, whatever i
    m   <- μ m + G
    d    = m ×_1 (U_1 + λ I)^(-1) ×_2 … ×_k (U_k + λ I)^(-1)

U_1 ⊗ … ⊗ U_k is the covariance of D if that is a Kronecker product, and has its trace in any case;
the scale is split evenly, so one λ damps all axes alike. The power is 1, Shampoo's is 1/2. Needs
one more backward pass a measurement; 2 Σ n_i² numbers and one copy a parameter; each step a product
an axis. Vectors have one axis: a full n x n matrix, as in the paper.
"""

import math

import torch
from torch import Tensor

from funcprecond.curvature.sampled_gradient import SampledGradient, SampledGradients
from funcprecond.evidence import Evidence, MissingEvidence
from funcprecond.linalg.batching import by_shape
from funcprecond.linalg.precision import factor_dtype
from funcprecond.methods.table import Card
from funcprecond.need import Every, Need
from funcprecond.representation import average
from funcprecond.representation.average import Decay, check_decay
from funcprecond.representation.diagonal import zero_weight
from funcprecond.representation.kronecker_dim import mode_gram
from funcprecond.solver.inverse_root import mode_product
from funcprecond.transform import Transform
from funcprecond.tree import Params, state

__all__ = ["TNTState", "normalised", "tnt"]

Factors = dict[str, tuple[Tensor, ...]]


@state
class TNTState:
    """What TNT keeps, in float32 or wider.

    Attributes:
        totals: for each parameter a tuple of (n_i, n_i) matrices; H_i is the total over ``weight``.
        inverses: likewise ``(U_i + λ I)^-1``.
        mean: m, shaped like the parameters.
        weight: 0-d, see :mod:`funcprecond.representation.average`.
    """

    totals: Factors
    inverses: Factors
    mean: Params
    weight: Tensor


def tnt(
    *,
    damping: float | Tensor = 0.1,
    labels: str = "mc",
    samples: int = 1,
    decay: Decay = 0.9,
    momentum: float | Tensor = 0.9,
    per_example: bool = False,
    every: int = 1,
    refresh_every: int = 20,
    start: int = 10,
) -> Transform:
    """TNT's direction.

    Args:
        damping: λ, added to every U_i, which has the units of the curvature's k-th root. What was
            never seen is multiplied by ``λ^-k``.
        labels, samples: see :class:`funcprecond.curvature.sampled_gradient.SampledGradient`.
        decay: β: None for the newest batch alone, or the weight of the old value of a
            bias-corrected moving average.
        momentum: μ, of the gradient.
        per_example: estimate the Fisher matrix itself. By default it is that of the mini-batch's
            gradient, smaller by the batch size, as in the authors' code: λ is then relative to it.
        every, refresh_every, start: the intervals of the measurement and of the inverses, see
            :func:`funcprecond.composition`.
    """
    check_decay(decay)
    curvature = SampledGradient(labels, samples)  # pyright: ignore[reportArgumentType]
    measure, refresh = Every("measure", every, start), Every("refresh", refresh_every, start)

    def init(params: Params) -> TNTState:
        totals = {
            k: tuple(p.new_zeros((n, n), dtype=factor_dtype(p)) for n in _sizes(p.shape))
            for k, p in params.items()
        }
        return TNTState(
            totals,
            {
                k: tuple(torch.eye(len(x), dtype=x.dtype, device=x.device) for x in factors)
                for k, factors in totals.items()
            },
            {k: torch.zeros_like(p, dtype=factor_dtype(p)) for k, p in params.items()},
            zero_weight(params),
        )

    def update(
        state: TNTState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[TNTState, Params]:
        if evidence is None:
            msg = f"tnt needs {curvature} too: pass the evidence of fp.observe to update"
            raise MissingEvidence(msg)
        totals, weight, inverses = state.totals, state.weight, state.inverses
        if measure in evidence:
            new = _covariances(evidence[curvature], totals, per_example)
            at = average.at(weight, decay)
            totals = {
                k: tuple(average.accumulate(h, x, at) for h, x in zip(t, new[k], strict=True))
                for k, t in totals.items()
            }
            weight = average.weight(weight, at)
        if refresh in evidence:
            covariances = {k: tuple(h / weight for h in t) for k, t in totals.items()}
            inverses = _inverses(covariances, inverses, damping)
        mean, direction = {}, {}
        for name, old in state.mean.items():
            mean[name] = momentum * old + grads[name].to(old.dtype)
            x = mean[name].reshape(_sizes(old.shape))
            for axis, inverse in enumerate(inverses[name]):
                x = mode_product(inverse, x, axis) if x.ndim > 1 else inverse @ x
            direction[name] = x.reshape(old.shape).to(grads[name].dtype)
        new = TNTState(totals, inverses, mean, weight)
        return new, {k: direction[k] for k in grads}

    def needs(t: int) -> tuple[Need, ...]:
        due = measure.due(t)
        return (*((curvature,) if due else ()), *due, *refresh.due(t))

    return Transform(init, update, needs)


def normalised(covariances: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """U_i of H_i, all of one trace: factors of equal mean eigenvalue c."""
    k, sizes = len(covariances), [len(h) for h in covariances]
    entries = math.prod(sizes)
    # All H_i have one trace; the clamp is for a gradient of zero.
    mean = covariances[0].trace() / entries
    c = mean.clamp_min(torch.finfo(mean.dtype).tiny) ** (1 / k)
    return tuple(
        h / (c ** (k - 1) * (entries // n)) for h, n in zip(covariances, sizes, strict=True)
    )


def _covariances(value: SampledGradients, like: Factors, per_example: bool) -> Factors:
    """C_i(D), summed over the samples."""
    found = {}
    for name, factors in like.items():
        d = value.grads[name].to(factors[0].dtype)
        d = d.reshape(d.shape[0], *(len(x) for x in factors))
        grams = (mode_gram(d, axis) for axis in range(1, d.ndim))
        found[name] = tuple(x / value.constant.to(x.dtype) if per_example else x for x in grams)
    return found


def _inverses(covariances: Factors, previous: Factors, damping: float | Tensor) -> Factors:
    """The damped inverses: one batched Cholesky decomposition for each size."""

    def invert(u: Tensor, old: Tensor, _) -> Tensor:
        eye = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
        # Of no curvature, or one that is no number, the old inverse is better than any.
        seen = u.diagonal(dim1=-2, dim2=-1).sum(-1) > 0
        ok = (torch.isfinite(u).all(-1).all(-1) & seen)[..., None, None]
        symmetric = (u + u.mT) / 2 + (damping * eye).to(u.dtype)
        factor, info = torch.linalg.cholesky_ex(torch.where(ok, symmetric, eye))
        ok = ok & (info == 0)[..., None, None]
        inverse = torch.cholesky_inverse(torch.where(ok, factor, eye))
        return torch.where(ok, inverse, old).contiguous()

    flat = [u for factors in covariances.values() for u in normalised(factors)]
    old = [x for factors in previous.values() for x in factors]
    found = iter(by_shape(invert, flat, old, static=[None] * len(flat)))
    return {k: tuple(next(found) for _ in factors) for k, factors in covariances.items()}


def _sizes(shape: torch.Size) -> tuple[int, ...]:
    """The lengths of the axes longer than 1; a scalar is a vector of one entry."""
    return tuple(n for n in shape if n > 1) or (1,)


CARDS = (
    Card(
        "tnt",
        "TNT (Ren & Goldfarb 2021)",
        "F̂_nmc, F̂_emp",
        "layer, KF-dim",
        "L direct, Cholesky inverse",
        tnt,
        learning_rate=2e-3,
        intervals=True,
        momentum=True,
    ),
)
