"""SENG: natural gradients by layers, through a sketched N x N matrix for N examples."""

from torch import Tensor

from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.curvature.sketch import Sketch
from funcprecond.evidence import Evidence, is_due, required
from funcprecond.losses.base import Labels
from funcprecond.methods.card import card
from funcprecond.need import Every, Need
from funcprecond.representation.layer_gram import LayerGram
from funcprecond.solver.smw import SMW, Woodbury
from funcprecond.transform import Transform, fitted
from funcprecond.tree import Params, state

__all__ = ["SENGState", "seng"]


@state
class SENGState:
    """The state of SENG.

    Attributes:
        gram: the rows U and their sketch, by block.
        cholesky: the lower Cholesky factor of ``λ I + K`` for each block with rows, (R, R).
        damping: λ of each block, 0-d, at least the rounding error of K.
    """

    gram: LayerGram
    cholesky: dict[str, Tensor]
    damping: dict[str, Tensor]


@card(
    "SENG (Yang 2021)",
    curvature="F̂_emp",
    representation="layer, Gram",
    solver="L/G direct, SMW inverse & sketching",
    learning_rate=0.01,
    starred=True,
)
def seng(
    *,
    damping: float | Tensor = 0.1,
    labels: Labels = "empirical",
    samples: int = 1,
    sketch: int = 256,
    rank: int = 16,
    window: int = 1,
    every: int = 10,
    start: int = 10,
) -> Transform:
    """SENG, sketched empirical natural gradient (Yang et al., arXiv 2006.05924).

    For each layer, the rows of U, (N, D), are the gradients ``G_n = Σ_t g_nt [a_nt, 1]ᵀ`` of the N
    examples times √c, where c is the loss's reduction constant. S takes a few of the D columns at
    random, so that ``E[S Sᵀ] = I``::

        K = (U S) (U S)ᵀ                                        (N, N)
        d = (g - Uᵀ (λ I + K)⁻¹ (U S) (Sᵀ g)) / λ               = (UᵀU + λ I)⁻¹ g if S = I

    S takes ``sketch`` columns of the output gradients g and of the inputs a, one from each of as
    many equal parts; U is not formed, because ``K_nm = c Σ_ts (a_nt · a_ms) (g_nt · g_ms)``. The
    gradient of an example with more than ``rank`` positions (pixels, tokens) is replaced by its
    largest ``rank`` terms ``(Vᵀg)ᵀ (Vᵀa)``, where V are the left singular vectors of its output
    gradients g, (T, o), unless the layer has at most ``sketch²`` entries: then G_n is formed.

    Args:
        damping: λ, positive, in units of the loss.
        labels: "empirical" for the labels of the data, "mc" for sampled labels, with ``samples``
            rows for each example, "exact" for one row for each output of each example.
        samples: the number of labels to sample for each term of the loss, with "mc".
        sketch: the number of columns that a sketch takes from each side. A side that has no more
            columns is taken whole.
        rank: the number of positions that are kept of each example.
        window: the number of measurements whose mean is the curvature matrix. With 1, it is that
            of the newest one.
        every, start: the interval of the measurement and of K, in steps; both are also due at each
            step before ``start``. The authors take 200 for ``every``.

    Returns:
        A method that needs the layers' inputs and output gradients, and random numbers if a layer
        is sketched. Its state has ``R (i + o) min(T, rank)`` numbers for a layer of i inputs and o
        outputs and R = ``window`` N rows, and R². K takes ``R² (s + s)`` operations with s columns
        and one position, a step takes two products of the rows with the gradient. The rows of norm
        layers are formed; parameters outside of layers are divided by the diagonal of F plus λ.

    Raises:
        ValueError: an option has a value that is not allowed.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.chain(fp.seng(damping=0.1), fp.momentum(0.9), fp.scale(0.1))
    """
    curvature, drawn = LayerStatistics(labels, samples, per_sample=True), Sketch(sketch)
    measure, solver = Every("measure", every, start), SMW(damping)

    def update(
        state: SENGState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[SENGState, Params]:
        evidence = required(evidence, curvature, drawn)
        gram, cholesky, ridge = state.gram, {}, {}
        if is_due(measure, evidence, curvature, drawn):
            options = {"rank": rank, "size": sketch, "window": window}
            gram = gram.accumulate(evidence[curvature], grads, evidence[drawn], **options)
        direction = {}
        for block in gram.weights:
            rows = gram.rows(block, grads)
            if gram is state.gram or gram.weights[block] is state.gram.weights.get(block):
                factor = Woodbury(rows, state.cholesky[block], state.damping[block])
            else:
                factor = solver.prepare(rows)
            cholesky[block], ridge[block] = factor.cholesky, factor.damping
            direction |= solver.apply(factor, {k: grads[k] for k in rows.like})
        direction |= {k: (grads[k] / (x + damping)) for k, x in gram.others.items()}
        direction = {k: direction[k].to(g.dtype) if k in direction else g for k, g in grads.items()}
        return SENGState(gram, cholesky, ridge), direction

    def needs(t: int) -> tuple[Need, ...]:
        return (*((curvature, drawn) if measure.due(t) else ()), *measure.marks(t))

    def init(params: Params) -> SENGState:
        return SENGState(LayerGram.init(params), {}, {})

    return fitted(Transform(init, update, needs), lambda state: state.gram.covered)
