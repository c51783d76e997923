"""A method on blocks of the parameters, as if these were parameters of their own."""

from funcprecond.evidence import Evidence
from funcprecond.linalg.blocking import Blocking
from funcprecond.transform import Transform, check_present
from funcprecond.tree import Params

__all__ = ["in_blocks"]


def in_blocks(inner: Transform, blocking: Blocking) -> Transform:
    """Apply a method to the blocks of the parameters, as if each block were a parameter.

    Only parameters with at least two axes longer than 1 are divided.

    Args:
        inner: a method that uses the gradient and its intervals only. Its state has one entry per
            block.
        blocking: the layout. The method applies ``max_dim`` itself.

    Returns:
        A transform with the needs of the method.
    """

    def split(params: Params) -> Params:
        check_present(params)
        blocks = {}
        for name, p in params.items():
            blocks |= blocking.split(name, p) if blocking.has_factors(p.shape) else {name: p}
        return blocks

    def update(state, grads: Params, evidence: Evidence | None = None):
        state, found = inner.update(state, split(grads), evidence)
        direction = {
            k: blocking.join(k, found, g) if blocking.has_factors(g.shape) else found[k]
            for k, g in grads.items()
        }
        return state, direction

    return Transform(lambda params: inner.init(split(params)), update, inner.needs)
