"""Weight decay, decoupled or as an L2 penalty, by where it stands in the chain."""

from collections.abc import Callable

from torch import Tensor

from funcprecond.evidence import Evidence, MissingEvidence
from funcprecond.linalg import treemath
from funcprecond.transform import Transform
from funcprecond.tree import Params

__all__ = ["parameters", "weight_decay"]


def weight_decay(
    coefficient: float | Tensor, *, mask: Callable[[str, Tensor], bool] | None = None
) -> Transform:
    """Add ``coefficient * params`` to the direction.

    After the preconditioner it is decoupled: ``chain(adam(), weight_decay(0.1), scale(lr))`` is
    AdamW. Before it, it is an L2 penalty in the gradient.

    Args:
        coefficient: what the parameters are multiplied by.
        mask: ``(name, parameter) -> bool``, which parameters decay; all by default. Matrices only:
            ``lambda name, p: p.ndim > 1``.

    Raises:
        MissingEvidence: ``update`` was called without evidence, which holds the parameters.
    """

    def update(
        state: tuple, grads: Params, evidence: Evidence | None = None
    ) -> tuple[tuple, Params]:
        params = parameters(evidence)
        chosen = {k: g for k, g in grads.items() if mask is None or mask(k, params[k])}
        return state, {**grads, **treemath.add(chosen, params, coefficient)}

    return Transform(lambda params: (), update)


def parameters(evidence: Evidence | None) -> Params:
    """Where the evidence was taken; raises :class:`MissingEvidence` if there is none."""
    if evidence is None:
        msg = "weight decay needs the parameters: pass the evidence of fp.observe to update"
        raise MissingEvidence(msg)
    return evidence.params
