r"""Losses that know their likelihood.

A loss is :math:`L = c \sum_n \sum_r \omega_{nr}\, \ell(f_{nr}, y_{nr})`: a *reduction constant*
``c`` times weighted terms, one or more for each of the N examples (axis 0 of the outputs).
Curvature needs more than its value: how a label is sampled from the model's own prediction, a
square root of the terms' Hessian in the outputs, and ``c`` itself, so that every curvature matrix
has the scale of the loss as the user computes it. The losses here have all three in closed form.
Any other callable ``(outputs, targets) -> 0-d tensor`` becomes a :class:`Custom` loss: gradient,
Hessian, Gauss-Newton product and empirical Fisher work, sampling raises a sentence.

*Cotangents* below are gradients with respect to the outputs of the terms without ``c``, shaped like
the outputs: pulled back through the model, they give rows whose outer products, summed and
multiplied by ``c``, are the curvature matrix.
"""

from typing import Any

import torch.nn.functional as F
from torch import nn

from funcprecond.losses.base import Custom, Loss
from funcprecond.losses.logistic import BCEWithLogits
from funcprecond.losses.regression import MSE, GaussianNLL, Huber
from funcprecond.losses.softmax import CrossEntropy

__all__ = [
    "MSE",
    "BCEWithLogits",
    "CrossEntropy",
    "Custom",
    "GaussianNLL",
    "Huber",
    "Loss",
    "as_loss",
    "bce_with_logits",
    "cross_entropy",
    "gaussian_nll",
    "huber",
    "mse",
]

cross_entropy = CrossEntropy()
mse = MSE()
bce_with_logits = BCEWithLogits()
huber = Huber()
gaussian_nll = GaussianNLL()

_FUNCTIONS = (
    (F.cross_entropy, CrossEntropy(class_dim=1)),
    (F.mse_loss, mse),
    (F.binary_cross_entropy_with_logits, bce_with_logits),
    (F.huber_loss, huber),
    (F.smooth_l1_loss, huber),
    (F.gaussian_nll_loss, gaussian_nll),
)


def as_loss(loss: Any) -> Loss:
    """The :class:`Loss` for what a user passes: ours, torch's own losses, or any callable.

    Raises:
        TypeError: ``loss`` is not callable.
        ValueError: a torch loss has an option whose curvature is not defined here.
    """
    if isinstance(loss, Loss):
        return loss
    if not callable(loss):
        msg = f"the loss must be callable as loss(outputs, targets), not a {type(loss).__name__}"
        raise TypeError(msg)
    for function, ours in _FUNCTIONS:
        if loss is function:
            return ours
    if isinstance(loss, nn.modules.loss._Loss):
        return _from_module(loss)
    return Custom(loss)  # pyright: ignore[reportArgumentType]


def _from_module(loss: Any) -> Loss:
    if loss.reduction == "none":
        msg = f"{loss} has reduction='none': training needs 'mean' or 'sum'"
        raise ValueError(msg)
    # "batchmean" divides by the number of examples, which is what a mean is here.
    reduction: Any = "sum" if loss.reduction == "sum" else "mean"
    if isinstance(loss, nn.CrossEntropyLoss):
        return CrossEntropy(
            loss.ignore_index, loss.label_smoothing, loss.weight, reduction, class_dim=1
        )
    if isinstance(loss, nn.MSELoss):
        return MSE(reduction)
    if isinstance(loss, nn.BCEWithLogitsLoss) and loss.weight is None:
        return BCEWithLogits(loss.pos_weight, reduction)
    if isinstance(loss, nn.HuberLoss):
        return Huber(loss.delta, reduction)
    if isinstance(loss, nn.SmoothL1Loss) and loss.beta == 1:
        return Huber(1.0, reduction)
    if isinstance(loss, nn.GaussianNLLLoss):
        return GaussianNLL(loss.full, loss.eps, reduction)
    return Custom(loss, reduction)
