"""What is said once for each problem, in a warning."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.checks import listed
from funcprecond.losses.base import INSIDE, Loss
from funcprecond.problems import LABELS, Problem, as_pair

__all__ = ["remind_of_curvature", "remind_of_route", "remind_of_shift"]

# The key of the tokens in a batch that is a mapping, by the convention of transformers.
TOKENS = "input_ids"


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


def remind_of_route(problem: Problem, names: Sequence[str], why: str, cost: str) -> None:
    """Say that per-sample gradients are computed in a slower way than by ``vmap``.

    Args:
        problem: the problem.
        names: the parameters.
        why: why ``vmap`` is not used.
        cost: what the other way costs.
    """
    problem.reminded["route"] += 1
    if problem.reminded["route"] > 1:
        return
    msg = (
        f"the per-sample gradients of {listed(names)}, which no recognised layer covers, are "
        f"computed for one example after another, since {why}: each costs {cost}. If this is too "
        "slow, give these parameters a method of the gradient with fp.partition"
    )
    warnings.warn(msg, stacklevel=2)


def remind_of_shift(problem: Problem, batch: Any) -> None:
    """Look once for each problem at whether the labels of a batch are the tokens themselves.

    The models of transformers shift such labels before they compute their own loss. A loss outside
    of the model does not, and would train the model to repeat its input.

    Args:
        problem: the problem.
        batch: the batch, before it is split.
    """
    problem.reminded["shift"] += 1
    if problem.split is not as_pair or not isinstance(batch, Mapping):
        return
    tokens, labels = batch.get(TOKENS), batch.get(LABELS)
    if not isinstance(tokens, Tensor) or not isinstance(labels, Tensor):
        return
    if tokens.shape != labels.shape or labels.ndim < 2:
        return
    kept = labels >= 0
    if bool(kept.any()) and bool((labels == tokens)[kept].all()):
        msg = (
            f"the {LABELS!r} of the batch are its {TOKENS!r}, which a model of transformers shifts "
            "before it computes its own loss, and a loss outside of it does not: a causal language "
            f"model needs {{..., {LABELS!r}: fp.losses.next_tokens(labels)}}"
        )
        warnings.warn(msg, stacklevel=2)
