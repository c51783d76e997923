"""SMW-NG: the exact natural gradient of one batch, through an N x N matrix for N examples."""

from torch import Tensor

from funcprecond.checks import at_least
from funcprecond.curvature.layer_statistics import ExampleRows
from funcprecond.curvature.objective import Objective
from funcprecond.evidence import Evidence, required
from funcprecond.linalg import treemath
from funcprecond.linalg.levenberg_marquardt import levenberg_marquardt, reduction_ratio
from funcprecond.losses.base import Labels
from funcprecond.methods.card import card
from funcprecond.representation.gram import Gram
from funcprecond.solver.smw import SMW
from funcprecond.transform import Transform, check_present
from funcprecond.tree import Params, state

__all__ = ["SMWNGState", "smw_ng"]


@state
class SMWNGState:
    """The damping λ, a 0-d tensor."""

    damping: Tensor


@card(
    "SMW-NG (Ren & Goldfarb 2019)",
    curvature="F̂_emp",
    representation="full, Gram, rank reduced",
    solver="L direct, SMW inverse",
    learning_rate=0.3,
    options={"damping": 1.0},
)
def smw_ng(
    *,
    damping: float | Tensor = 1e-1,
    labels: Labels = "empirical",
    samples: int = 1,
    examples: int | None = None,
    adapt: bool = False,
    factor: float = 1.01,
) -> Transform:
    """SMW-NG (Ren & Goldfarb, arXiv 1906.02353).

    The rows of U, (N, P), are the gradients of the N examples times √c, where c is the loss's
    reduction constant (1/N for a mean). The Sherman-Morrison-Woodbury identity gives::

        K = U Uᵀ                                           summed over the layers, U is not formed
        d = (Uᵀ U + λ I)⁻¹ g = (g - Uᵀ (λ I + K)⁻¹ U g) / λ
        d = √c Uᵀ (λ I + K)⁻¹ 1                            where g is this batch's own gradient

    Args:
        damping: λ, positive, in units of the loss; the initial value if ``adapt`` is set.
        labels: "empirical" for the labels of the data, with one row for each example; "mc" for
            sampled labels, with ``samples`` rows for each example; "exact" for the exact Fisher
            matrix, with one row for each output of each example.
        samples: the number of labels to sample for each term of the loss, with "mc".
        examples: the number of examples that give the rows, the first ones of the batch; by default
            all of them. The gradient is that of the whole batch.
        adapt: whether the Levenberg-Marquardt rule changes λ. It compares the change of the loss
            after the step ``-d`` with the predicted one, ``-gᵀd / 2``, and costs one loss per step.
        factor: the number by which the rule multiplies or divides λ.

    Returns:
        A method that needs the inputs and output gradients of the layers, and per-sample gradients
        of parameters outside of layers. K takes ``N² (i + o)`` operations for each layer of i
        inputs and o outputs, the solve N³ / 3. The state is λ.

    Raises:
        ValueError: an option is out of range. ``fp.observe`` raises it where a BatchNorm in
            training mode couples the examples.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.chain(fp.smw_ng(damping=0.1), fp.scale(0.3))
    """
    at_least(1, factor=factor)
    need, objective = ExampleRows(labels, samples), Objective()

    def update(
        state: SMWNGState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[SMWNGState, Params]:
        evidence = required(evidence, need)
        check_present(grads)
        solver = SMW(state.damping)
        rows = Gram.from_layers(evidence[need], grads, examples)
        inverse = solver.prepare(rows)
        if labels == "empirical" and examples is None and evidence.is_own(grads):
            # The gradient is the sum of the rows of U over √c, that is, Uᵀ y with all y equal.
            y = rows.scale.rsqrt().expand(rows.count)
            direction = solver.push_through(inverse, y, grads)
        else:
            direction = solver.apply(inverse, grads)
        if not adapt:
            return state, direction
        step = treemath.mul(direction, -1.0)
        change = evidence[objective].loss_after(step) - evidence.loss
        ratio = reduction_ratio(change, -0.5 * treemath.dot(grads, direction))
        lam = levenberg_marquardt(state.damping, ratio, up=factor, down=1 / factor)
        return SMWNGState(lam), direction

    return Transform(
        lambda params: SMWNGState(treemath.scalar_like(params, damping)),
        update,
        lambda t: (need, objective) if adapt else (need,),
    )
