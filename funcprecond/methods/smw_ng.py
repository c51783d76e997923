"""SMW-NG: the natural gradient of one batch, exactly, through a matrix of its examples' size."""

from torch import Tensor

from funcprecond.checks import at_least
from funcprecond.curvature.layer_statistics import ExampleRows
from funcprecond.curvature.objective import Objective
from funcprecond.evidence import Evidence, MissingEvidence
from funcprecond.linalg import treemath
from funcprecond.linalg.levenberg_marquardt import levenberg_marquardt, reduction_ratio
from funcprecond.losses.base import Labels
from funcprecond.methods.card import card
from funcprecond.representation.gram import Gram
from funcprecond.solver.smw import SMW
from funcprecond.transform import Transform
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
    adapt: bool = False,
    factor: float = 1.01,
) -> Transform:
    """SMW-NG (Ren & Goldfarb, arXiv 1906.02353).

    With U the (N, P) matrix of the examples' gradients times √c, c the loss's reduction constant::

        K = U Uᵀ                                           by layers, no row of U is formed
        d = (Uᵀ U + λ I)⁻¹ g = (g - Uᵀ (λ I + K)⁻¹ U g) / λ
        d = √c Uᵀ (λ I + K)⁻¹ 1                            where g is this batch's own gradient

    Args:
        damping: λ, positive, in the loss's units; where ``adapt`` starts from.
        labels: "empirical" for the data's own, one row for each example; "mc" for sampled ones,
            ``samples`` rows for each example; "exact" for the whole Fisher matrix, one row for each
            entry of an example's output.
        samples: sampled labels for each term, with "mc".
        adapt: let λ follow Levenberg and Marquardt's rule, for one more loss at each step: of the
            step ``-d``, whose model predicts the change ``-gᵀd / 2``.
        factor: what λ is multiplied or divided by.

    Returns:
        A method that needs the layers' inputs and output gradients, and rows for parameters outside
        of layers. K takes ``N² (i + o)`` operations for a layer, the solve N³ / 3. There is no state
        but λ.

    Raises:
        ValueError: an option is out of range; or, at the first step, a BatchNorm in training mode
            couples the examples.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.chain(fp.smw_ng(damping=0.1), fp.scale(0.3))
    """
    if not isinstance(damping, Tensor) and not damping > 0:
        msg = f"damping must be positive, not {damping}: it is what makes the inverse exist"
        raise ValueError(msg)
    at_least(1, factor=factor)
    need, objective = ExampleRows(labels, samples), Objective()

    def update(
        state: SMWNGState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[SMWNGState, Params]:
        if evidence is None:
            msg = f"smw_ng needs {need} beside the gradient: pass the evidence of fp.observe"
            raise MissingEvidence(msg)
        solver = SMW(state.damping)
        rows = Gram.from_layers(evidence[need], grads)
        inverse = solver.prepare(rows)
        if labels == "empirical" and all(g is evidence.grads[k] for k, g in grads.items()):
            # The rows without √c sum to the gradient: it is U^T y with all y equal.
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
