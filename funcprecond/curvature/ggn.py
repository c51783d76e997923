"""The Gauss-Newton matrix ``J^T H_L J``; for a likelihood it is the Fisher matrix."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.curvature.arguments import batch_and_vector
from funcprecond.curvature.jacobian import jvp, linearize, vjp
from funcprecond.need import Need
from funcprecond.problems import Problem
from funcprecond.tree import Buffers, Params

__all__ = ["GGNOperator", "ggn_mv"]


@overload
def ggn_mv(
    f: Callable[[Params], Any],
    params: Params,
    vector: Params,
    /,
    *,
    loss: Callable[[Any], Tensor],
) -> Params: ...


@overload
def ggn_mv(
    problem: Problem,
    params: Params,
    batch: Any,
    vector: Params,
    /,
    *,
    buffers: Buffers | None = None,
    generator: torch.Generator | None = None,
) -> Params: ...


def ggn_mv(
    f: Any,
    params: Params,
    /,
    *rest: Any,
    loss: Callable[[Any], Tensor] | None = None,
    buffers: Buffers | None = None,
    generator: torch.Generator | None = None,
) -> Params:
    """The Gauss-Newton matrix ``J^T H_L J`` times a vector.

    It is called as ``ggn_mv(f, params, vector, loss=loss)`` or
    ``ggn_mv(problem, params, batch, vector)``. J is the Jacobian of the outputs, and H_L is the
    Hessian of the loss with respect to the outputs. H_L has a closed form for the losses of
    :mod:`funcprecond.losses` (its expectation for ``gaussian_nll``) and is computed by automatic
    differentiation for any other loss.

    Args:
        f: a function of ``params`` that returns a tree of outputs; or a
            :class:`funcprecond.Problem`.
        params: the point at which the matrix is taken.
        *rest: the vector, shaped like ``params``; for a problem, the batch comes before it.
        loss: required for a function, and not used for a problem: a function of the outputs that
            returns a 0-d tensor.
        buffers: the model's buffers; by default those of the problem.
        generator: the source of randomness for the model's dropout masks.

    Returns:
        A dict shaped like ``params``. Costs about 1.7 gradients; for many products at one point,
        use :func:`funcprecond.linearize` or :class:`funcprecond.GGN`.

    Raises:
        TypeError: the number of arguments is wrong, or the ``loss`` of a function is missing.
        ValueError: random numbers are needed and there is no generator, or the batch is empty.
        NotImplementedError: torch cannot differentiate a part of the function.

    Example:
        >>> import torch, funcprecond as fp
        >>> x = {"x": torch.tensor([1.0, 2.0])}
        >>> fp.ggn_mv(lambda p: p["x"] ** 2, x, x, loss=lambda y: 0.5 * y.square().sum())
        {'x': tensor([ 4., 32.])}
    """
    batch, vector = batch_and_vector("ggn_mv", f, rest)
    if isinstance(f, Problem):
        opened = linearize(f, params, batch, buffers=buffers, generator=generator)
        return opened.ggn_mv(vector, keep=False)
    if loss is None:
        msg = (
            "ggn_mv of a function requires its loss: call it as ggn_mv(f, params, vector, "
            "loss=loss), where loss is a function of the outputs"
        )
        raise TypeError(msg)
    pushed = jvp(f, params, vector)
    curved = torch.func.vjp(torch.func.grad(loss), f(params))[1](pushed)[0]
    return vjp(f, params, curved)


@dataclasses.dataclass(frozen=True)
class GGNOperator(Need):
    """The function ``vector -> G vector`` on this batch, which is valid for one step only.

    Each call costs 0.9 to 1.4 gradients.
    """

    twice: ClassVar[bool] = True

    def measure(self, evaluation: Evaluation, noise: Any) -> Callable[[Params], Params]:
        return evaluation.ggn_mv
