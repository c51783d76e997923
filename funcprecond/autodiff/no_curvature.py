"""The reminder that a Gauss-Newton matrix is zero, because the loss is linear in the outputs."""

import warnings
from typing import Any

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.losses.base import INSIDE, Loss
from funcprecond.problems import Problem

__all__ = ["remind_of_curvature"]


def remind_of_curvature(
    problem: Problem, outputs: Any, targets: Any, vector: Any, product: Any
) -> None:
    """Look once for each problem at a product with the Hessian of the loss in the outputs.

    Args:
        problem: the problem.
        outputs, targets: those of the run.
        vector: shaped like the outputs.
        product: the product of the Hessian and the vector. Where it is not zero, nothing happens.

    Raises:
        TypeError: the product is zero because the loss is computed inside of the model, so that it
            depends on outputs without an axis only.
    """
    by_hand = type(problem.loss).hessian_product is not Loss.hessian_product
    if by_hand or any(bool(x.any()) for x in tree.floating(product)):
        problem.reminded["curvature"] += 1
        return
    if not any(bool(x.any()) for x in tree.floating(vector)):
        return
    gradients = _gradients(problem, outputs, targets)
    if not gradients:
        raise TypeError(INSIDE)
    # Where nothing counts, as where all targets are ignored, another batch tells.
    if not any(bool(g.any()) for g in gradients):
        return
    problem.reminded["curvature"] += 1
    msg = (
        "the Hessian of the loss in the outputs of the model is zero, as that of a loss which is "
        "linear in the outputs, so that the Gauss-Newton matrix is zero, too: use the Hessian, or "
        "a need of gradients only, such as labels='empirical'; where the model computes its loss "
        "itself, choose its predictions with fp.problem(..., outputs='logits')"
    )
    warnings.warn(msg, stacklevel=2)


def _gradients(problem: Problem, outputs: Any, targets: Any) -> list[Tensor]:
    """The gradients of the loss in the outputs with an axis, of those that it depends on."""
    flat: list[Tensor] = [x.detach().requires_grad_() for x in tree.floating(outputs)]
    sized = [x for x in flat if x.ndim]
    with torch.enable_grad():
        value = problem.loss(tree.with_floating(outputs, flat), targets)
    if not sized or not value.requires_grad:
        return []
    return [g for g in torch.autograd.grad(value, sized, allow_unused=True) if g is not None]
