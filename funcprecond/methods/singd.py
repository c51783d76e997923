"""SINGD: K-FAC whose factors are those of the inverse, by matrix products alone."""

from typing import Literal

from torch import Tensor

from funcprecond.checks import one_of
from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.evidence import Evidence, is_due, required
from funcprecond.layers.layer_call import Sharing
from funcprecond.linalg.inverse_free import times_square
from funcprecond.methods.card import card
from funcprecond.need import Every, Need
from funcprecond.representation.inverse_roots import InverseRoots, Structure
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

__all__ = ["singd"]


@card(
    "SINGD (Lin 2024)",
    curvature="F̂_emp",
    representation="layer, KF-io of the inverse",
    solver="G iter, products only",
    learning_rate=0.1,
)
def singd(
    *,
    damping: float | Tensor = 1e-3,
    form: Literal["singd", "ikfac"] = "singd",
    structure: Structure = "dense",
    rate: float | Tensor = 0.01,
    momentum: float | Tensor = 0.5,
    normalize: bool = True,
    sharing: Sharing = "expand",
    every: int = 10,
) -> Transform:
    """SINGD, structured inverse-free natural gradient descent (Lin et al., arXiv 2312.05705).

    With K-FAC's factors A and B of a batch (:func:`funcprecond.kfac`, for the labels of the data),
    the method follows roots K and C, with ``K Kᵀ ≈ (A + λ I)^-1`` and ``C Cᵀ ≈ (B + λ I)^-1``. Both
    start as I, and no matrix is inverted or decomposed. t(X) is the mean of X's diagonal::

        H_K = Kᵀ A K            H_C = Cᵀ B C
        m_K <- α m_K + ½ (t(H_C) H_K + λ t(Cᵀ C) Kᵀ K - I)          form="singd"
        m_C <- α m_C + ½ (t(H_K) H_C + λ t(Kᵀ K) Cᵀ C - I)
        m_K = ½ (H_K + λ Kᵀ K - I),  m_C = ½ (H_C + λ Cᵀ C - I)     form="ikfac"
        K <- K (I - β m_K)      C <- C (I - β m_C)
        d = C Cᵀ [∇W | ∇b] K Kᵀ

    IKFAC's roots follow a moving average of A and B, of which the newest batch has the weight β, up
    to terms in β². Norm layers and parameters outside of layers are treated as by K-FAC, with the
    decay ``1 - β``.

    Args:
        damping: λ, added to both factors (it is not divided between them, as in K-FAC).
        form: "singd", also known as INGD if the roots are dense; or "ikfac", without momentum.
        structure: "dense" roots, or "diagonal" ones, of which only the diagonal of m is computed.
            The root of an embedding's factor of indices is always diagonal.
        rate: β, the step of the roots.
        momentum: α, for "singd".
        normalize: whether to divide β by the largest absolute row sum of m, if that exceeds 1.
            No eigenvalue of ``I - β m`` is then below ``1 - β``; without it, the roots can diverge
            where A or B is large at the start. The authors' program divides by the largest entry,
            if asked to, which does not bound the eigenvalues.
        sharing: how the positions of one example are combined, "expand" or "reduce", see
            :class:`funcprecond.curvature.LayerStatistics`.
        every: the roots take a step at every ``every``-th step.

    Returns:
        A method that needs the inputs of the layers and their output gradients, of which the
        gradient consists anyway. Its state has 2 (i² + o²) numbers for a layer of i inputs and o
        outputs, half of it with "ikfac". A step of the roots takes up to 4 products of each size;
        every step takes 4.

    Raises:
        ValueError: an option has a value that is not allowed.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.chain(fp.singd(structure="diagonal"), fp.momentum(0.9), fp.scale(1e-3))
    """
    one_of(("singd", "ikfac"), form=form)
    one_of(("dense", "diagonal"), structure=structure)
    curvature = LayerStatistics("empirical", sharing=sharing, tied=True)
    measure = Every("measure", every)
    coupled = momentum if form == "singd" else None

    def update(
        state: InverseRoots, grads: Params, evidence: Evidence | None = None
    ) -> tuple[InverseRoots, Params]:
        evidence = required(evidence, curvature)
        if is_due(measure, evidence, curvature):
            state = state.follow(evidence[curvature], damping, rate, coupled, normalize)

        def solve(block: str, gradient: LayerGradient) -> LayerGradient:
            c, k = state.left[block], state.right[block]
            return gradient.map(lambda x: times_square(x, c), lambda x: times_square(x, k))

        shapes = {
            block: BlockShape(c.shape[0] if c.ndim == 3 else 1, c.shape[-1])
            for block, c in state.left.items()
        }
        _, _, scales, others = state.rest.averages()
        inverses = unit_inverses(scales, damping)
        rows = gradient_rows(grads, evidence)
        return state, apply_blocks(grads, shapes, solve, inverses, others, damping, rows)

    def needs(t: int) -> tuple[Need, ...]:
        wanted = (curvature,) if measure.due(t) else ()
        return (GRADIENT_ROWS, *wanted, *measure.marks(t))

    def init(params: Params) -> InverseRoots:
        return InverseRoots.init(params, structure)

    return fitted(Transform(init, update, needs), lambda state: state.rest.covered)
