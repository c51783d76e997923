"""The losses that are recognised when a model or a training loop calls them."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from funcprecond.losses import MSE, NLL, BCEWithLogits, CrossEntropy, Huber, Loss

__all__ = ["RECOGNISED", "recognised"]


def recognised(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Loss, Tensor, Tensor] | None:
    """The loss that a call of a torch function computes.

    Args:
        function: the torch function.
        args, kwargs: its arguments.

    Returns:
        The loss, the outputs of the model and the targets. None where the function is not a loss
        that is known here, or returns its terms without combining them.
    """
    make = RECOGNISED.get(function)
    if make is None:
        return None
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    # The two older arguments that `reduction` replaces.
    if given.get("size_average") is not None or given.get("reduce") is not None:
        return None
    loss = None if given["reduction"] not in ("mean", "sum") else make(given)
    return None if loss is None else (loss, given["input"], given["target"])


def _cross_entropy(given: Mapping[str, Any]) -> Loss:
    options = (given["ignore_index"], given["label_smoothing"], given["weight"])
    return CrossEntropy(*options, given["reduction"], class_dim=1)


def _nll(given: Mapping[str, Any]) -> Loss:
    return NLL(given["ignore_index"], given["weight"], given["reduction"], class_dim=1)


def _mse(given: Mapping[str, Any]) -> Loss | None:
    return None if given.get("weight") is not None else MSE(given["reduction"])


def _binary(given: Mapping[str, Any]) -> Loss:
    return BCEWithLogits(given["pos_weight"], given["reduction"], given["weight"])


def _huber(given: Mapping[str, Any]) -> Loss | None:
    return None if given.get("weight") is not None else Huber(given["delta"], given["reduction"])


def _smooth_l1(given: Mapping[str, Any]) -> Loss | None:
    return Huber(1.0, given["reduction"]) if given["beta"] == 1 else None


RECOGNISED: dict[Callable[..., Any], Callable[[Mapping[str, Any]], Loss | None]] = {
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _nll,
    F.mse_loss: _mse,
    F.binary_cross_entropy_with_logits: _binary,
    F.huber_loss: _huber,
    F.smooth_l1_loss: _smooth_l1,
}
"""For each function of torch that is recognised, what makes the loss of its arguments."""
