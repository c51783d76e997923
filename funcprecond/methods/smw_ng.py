"""SMW-NG: the natural gradient of one batch, exactly, through a matrix of its examples' size.

Row: F̂_emp, full, Gram, rank reduced, SMW inverse. Ren & Goldfarb, arXiv 1906.02353. With U the (N,
P) matrix of the examples' gradients times √c, c the loss's reduction constant::

    K = U Uᵀ                                           by layers, no row of U is formed
    d = (Uᵀ U + λ I)⁻¹ g = (g - Uᵀ (λ I + K)⁻¹ U g) / λ
    d = √c Uᵀ (λ I + K)⁻¹ 1                            where g is this batch's own gradient

Needs the layers' inputs and output gradients, and rows for parameters outside of layers. K takes
``N² (i + o)`` operations a layer, the solve N³ / 3. No state but λ.
"""

import dataclasses
from typing import Any, Literal

from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.curvature.objective import Objective
from funcprecond.evidence import Evidence, MissingEvidence
from funcprecond.layers.blocks import Layers
from funcprecond.linalg import treemath
from funcprecond.linalg.levenberg_marquardt import levenberg_marquardt, reduction_ratio
from funcprecond.losses.base import Labels
from funcprecond.methods.table import Card
from funcprecond.representation.diagonal import zero_weight
from funcprecond.representation.gram import Gram
from funcprecond.solver.smw import SMW
from funcprecond.transform import Transform
from funcprecond.tree import Params, state

__all__ = ["ExampleRows", "SMWNGState", "smw_ng"]


@dataclasses.dataclass(frozen=True)
class ExampleRows(LayerStatistics):
    """Layer statistics that tell the examples apart, and rows for everything else."""

    others: Literal["diagonal", "rows", "none"] = "rows"
    per_sample: bool = True

    def measure(self, evaluation: Evaluation, noise: Any) -> Layers:
        if coupling := evaluation.problem.couples_examples():
            msg = (
                f"per-example gradients are not defined: {coupling} couples the examples of a "
                "batch; put it in eval mode, or use GroupNorm"
            )
            raise ValueError(msg)
        return super().measure(evaluation, noise)


@state
class SMWNGState:
    """Attributes: the damping λ, a 0-d tensor."""

    damping: Tensor


def smw_ng(
    *,
    damping: float | Tensor = 1e-1,
    labels: Labels = "empirical",
    samples: int = 1,
    adapt: bool = False,
    factor: float = 1.01,
) -> Transform:
    """SMW-NG's direction.

    Args:
        damping: λ, positive, in the loss's units; where ``adapt`` starts from.
        labels: "empirical" for the data's own, one row an example; "mc" for sampled ones,
            ``samples`` rows an example; "exact" for the whole Fisher matrix, one row for each entry
            of an example's output.
        samples: sampled labels for each term, with "mc".
        adapt: let λ follow Levenberg and Marquardt's rule, for one more loss a step: of the step
            ``-d``, whose model predicts the change ``-gᵀd / 2``.
        factor: what λ is multiplied or divided by.

    Raises:
        ValueError: an option is out of range. At the first step: a BatchNorm in training mode
            couples the examples.
    """
    if not isinstance(damping, Tensor) and not damping > 0:
        msg = f"damping must be positive, not {damping}: it is what makes the inverse exist"
        raise ValueError(msg)
    if not factor >= 1:
        msg = f"factor must be at least 1, not {factor}"
        raise ValueError(msg)
    need, objective = ExampleRows(labels, samples), Objective()

    def init(params: Params) -> SMWNGState:
        return SMWNGState(zero_weight(params) + damping)

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
        stepped = {k: (evidence.params[k] - d).to(d.dtype) for k, d in direction.items()}
        change = evidence[objective].loss({**evidence.params, **stepped}) - evidence.loss
        ratio = reduction_ratio(change, -0.5 * treemath.dot(grads, direction))
        lam = levenberg_marquardt(state.damping, ratio, up=factor, down=1 / factor)
        return SMWNGState(lam), direction

    return Transform(init, update, lambda t: (need, objective) if adapt else (need,))


CARDS = (
    Card(
        "smw_ng",
        "SMW-NG (Ren & Goldfarb 2019)",
        "F̂_emp",
        "full, Gram, rank reduced",
        "L direct, SMW inverse",
        smw_ng,
        learning_rate=0.3,
        options={"damping": 1.0},
    ),
)
