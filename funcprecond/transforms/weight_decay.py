"""Weight decay, which is decoupled or an L2 penalty depending on its place in the chain."""

from collections.abc import Callable

from torch import Tensor

from funcprecond.checks import checked
from funcprecond.evidence import Evidence, required
from funcprecond.linalg import treemath
from funcprecond.transform import Transform, check_present
from funcprecond.tree import Params

__all__ = ["weight_decay"]


@checked
def weight_decay(
    coefficient: float | Tensor, *, mask: Callable[[str, Tensor], bool] | None = None
) -> Transform:
    """Add ``coefficient * params`` to the direction.

    After the preconditioner, the decay is decoupled:
    ``chain(adam(), weight_decay(0.1), scale(lr))`` is AdamW. Before the preconditioner, it is an L2
    penalty in the gradient.

    Args:
        coefficient: the number by which the parameters are multiplied.
        mask: ``(name, parameter) -> bool``, which selects the parameters that decay; all by
            default. ``lambda name, p: p.ndim > 1`` selects the matrices.

    Returns:
        A transform without state. Its ``update`` takes the parameters from the evidence, and raises
        :class:`funcprecond.MissingEvidence` without it.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(4, 3), fp.losses.cross_entropy)
        >>> batch = torch.ones(8, 4), torch.arange(8) % 3
        >>> evidence, opt = fp.observe(problem, problem.params, batch), fp.weight_decay(0.5)
        >>> _, direction = opt.update((), evidence.grads, evidence)
        >>> expected = evidence.grads["bias"] + 0.5 * problem.params["bias"]
        >>> torch.allclose(direction["bias"], expected)
        True
    """

    def update(
        state: tuple, grads: Params, evidence: Evidence | None = None
    ) -> tuple[tuple, Params]:
        check_present(grads)
        params = required(evidence).params
        chosen = {k: g for k, g in grads.items() if mask is None or mask(k, params[k])}
        return state, {**grads, **treemath.add(chosen, params, coefficient)}

    return Transform(lambda params: (), update)
