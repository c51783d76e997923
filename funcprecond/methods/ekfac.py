"""EKFAC: K-FAC's eigenbasis, with the exact second moments of the gradients in it."""

from torch import Tensor

from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.evidence import Evidence, is_due, required
from funcprecond.losses.base import Labels
from funcprecond.methods.card import card
from funcprecond.need import Every, Need
from funcprecond.representation.average import Decay, check_decay
from funcprecond.representation.eigenbasis_moments import EigenbasisMoments
from funcprecond.solver.eigen import groups_of, rotate, rotate_back
from funcprecond.solver.layer_gradient import (
    GRADIENT_ROWS,
    BlockShape,
    LayerGradient,
    apply_blocks,
    gradient_rows,
    unit_inverses,
)
from funcprecond.transform import Transform, fitted
from funcprecond.tree import Params

__all__ = ["ekfac"]


@card(
    "EKFAC (George 2018)",
    curvature="F̂_nmc, F̂_emp",
    representation="layer, KF-io",
    solver="L/G direct, eigendecomposition",
    learning_rate=0.03,
    options={"damping": 0.1},
)
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
    """EKFAC (George et al., arXiv 1806.03884).

    Let U_B and U_A be the eigenvectors of K-FAC's factors B and A (see :func:`funcprecond.kfac`),
    G_n the gradient of example n in ``[W | b]``, and c the loss's reduction constant::

        s = c Σ_n (U_Bᵀ G_n U_A)²        element-wise, each G_n summed over its positions
        d = U_B ( (U_Bᵀ [∇W | ∇b] U_A) / (s + λ) ) U_Aᵀ

    s is the best diagonal in that basis, in the Frobenius norm, so that the approximation is never
    worse than K-FAC's.

    Args:
        damping: λ, added to the second moments, in units of the loss.
        labels, samples: as for :func:`funcprecond.kfac`.
        decay: the weight of the old factors and of the old second moments, or None to use the
            newest batch alone. The moments belong to a basis, so they start anew at each refresh.
        every, refresh_every, start: the intervals of the measurement and of the bases, in steps,
            see :func:`funcprecond.compose`. A refresh needs a measurement, so ``refresh_every``
            must be a multiple of ``every``.

    Returns:
        A method that needs layer statistics with the examples kept apart. Its state is K-FAC's
        factors and their bases, and one copy of the parameters. A measurement updates s; a refresh
        decomposes the factors.

    Raises:
        ValueError: an option has a value that is not allowed.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.chain(fp.ekfac(damping=0.1), fp.scale(0.03))
    """
    check_decay(decay)
    if refresh_every % every:
        msg = f"refresh_every={refresh_every} must be a multiple of every={every}"
        raise ValueError(msg)
    curvature = LayerStatistics(labels, samples, per_sample=True)
    measure, refresh = Every("measure", every, start), Every("refresh", refresh_every, start)

    def update(
        state: EigenbasisMoments, grads: Params, evidence: Evidence | None = None
    ) -> tuple[EigenbasisMoments, Params]:
        evidence = required(evidence, curvature)
        if is_due(measure, evidence, curvature):
            due = is_due(refresh, evidence)
            state = state.accumulate(evidence[curvature], decay, refresh=due)
        factors, moments = state.factors, state.second_moments()
        divisor = factors.divisors()

        def solve(block: str, gradient: LayerGradient) -> LayerGradient:
            left, right = state.left.get(block), state.right[block]
            rotated = rotate(gradient, left, right) / (moments[block] + damping)
            return rotate_back(rotated, left, right)

        direction = apply_blocks(
            grads,
            {
                k: BlockShape(groups_of(x), state.moments[k].shape[-2])
                for k, x in state.right.items()
            },
            solve,
            unit_inverses({k: x / divisor(k) for k, x in factors.units.items()}, damping),
            {k: x / divisor(k) for k, x in factors.others.items()},
            damping,
            gradient_rows(grads, evidence),
        )
        return state, direction

    def needs(t: int) -> tuple[Need, ...]:
        wanted = (curvature,) if measure.due(t) else ()
        return (GRADIENT_ROWS, *wanted, *measure.marks(t), *refresh.marks(t))

    return fitted(Transform(EigenbasisMoments.init, update, needs), lambda s: s.factors.covered)
