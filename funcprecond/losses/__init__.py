r"""Losses with their likelihoods.

A loss is :math:`L = c \sum_n \sum_r \omega_{nr}\, \ell(f_{nr}, y_{nr})`: a *reduction constant*
``c`` times a sum of terms with weights :math:`\omega_{nr}`. There are one or more terms r for each
of the N examples n, which are axis 0 of the outputs f; y are the targets.

A curvature matrix needs more of a loss than its value: a way to sample a label from the prediction
of the model, a square root of the Hessian of the terms in the outputs, and ``c``, which gives the
matrix the scale of the loss. The losses in this package have all three in closed form. Any other
callable ``(outputs, targets) -> 0-d tensor`` becomes a :class:`Custom` loss. It has a gradient, a
Hessian, a Gauss-Newton matrix and an empirical Fisher matrix; sampling raises a TypeError.

*Cotangents* are gradients of the terms in the outputs, without ``c``. They are shaped like the
outputs. Their pull-backs through the model are the rows of a matrix. The sum of the outer products
of these rows, multiplied by ``c``, is the curvature matrix.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from funcprecond.losses.base import Custom, Loss
from funcprecond.losses.language import next_tokens
from funcprecond.losses.logistic import BCEWithLogits
from funcprecond.losses.regression import MSE, GaussianNLL, Huber
from funcprecond.losses.residual import Energy, HalfSquares
from funcprecond.losses.softmax import NLL, CrossEntropy

__all__ = [
    "MSE",
    "NLL",
    "BCEWithLogits",
    "CrossEntropy",
    "Custom",
    "Energy",
    "GaussianNLL",
    "HalfSquares",
    "Huber",
    "Loss",
    "as_loss",
    "bce_with_logits",
    "cross_entropy",
    "gaussian_nll",
    "huber",
    "mse",
    "next_tokens",
    "nll",
]

cross_entropy = CrossEntropy()
nll = NLL()
mse = MSE()
bce_with_logits = BCEWithLogits()
huber = Huber()
gaussian_nll = GaussianNLL()

_FUNCTIONS = (
    (F.cross_entropy, CrossEntropy(class_dim=1)),
    (F.nll_loss, NLL(class_dim=1)),
    (F.mse_loss, mse),
    (F.binary_cross_entropy_with_logits, bce_with_logits),
    (F.huber_loss, huber),
    (F.smooth_l1_loss, huber),
    (F.gaussian_nll_loss, gaussian_nll),
)


def _entries(outputs: Tensor, targets: Any) -> int:
    return outputs.numel()


# The losses of torch without a counterpart here whose mean is that over all entries.
_OF_ENTRIES = {
    nn.BCELoss: F.binary_cross_entropy,
    nn.HingeEmbeddingLoss: F.hinge_embedding_loss,
    nn.KLDivLoss: F.kl_div,
    nn.L1Loss: F.l1_loss,
    nn.MultiLabelSoftMarginLoss: F.multilabel_soft_margin_loss,
    nn.PoissonNLLLoss: F.poisson_nll_loss,
    nn.SmoothL1Loss: None,
    nn.SoftMarginLoss: F.soft_margin_loss,
}


def as_loss(loss: Any) -> Loss:
    """Convert a loss of torch, or any other callable, to a :class:`Loss`.

    Args:
        loss: a :class:`Loss`, a loss function or loss module of torch, or any other callable
            ``(outputs, targets) -> 0-d tensor``.

    Returns:
        The :class:`Loss`. A loss of torch without a counterpart in this package, or with an option
        that the counterpart does not have, becomes a :class:`Custom` loss with its own divisor. So
        does a subclass that has a ``forward`` of its own, and any other callable; see
        :class:`Custom` for what is assumed of them.

    Raises:
        TypeError: ``loss`` is not callable.
        ValueError: ``loss`` is a module of torch with ``reduction="none"``.

    Example:
        >>> import torch, funcprecond as fp
        >>> fp.losses.as_loss(torch.nn.MSELoss(reduction="sum"))
        MSE(reduction='sum')
    """
    if isinstance(loss, Loss):
        return loss
    if not callable(loss):
        msg = f"the loss must be callable as loss(outputs, targets), not a {type(loss).__name__}"
        raise TypeError(msg)
    for function, ours in _FUNCTIONS:
        if loss is function:
            return ours
    if any(loss is function for function in _OF_ENTRIES.values()):
        return Custom(loss, divisor=_entries)  # pyright: ignore[reportArgumentType]
    if isinstance(loss, nn.modules.loss._Loss):
        return _from_module(loss)
    return Custom(loss)  # pyright: ignore[reportArgumentType]


def _from_module(loss: Any) -> Loss:
    kind = next(k for k in type(loss).__mro__ if "forward" in k.__dict__)
    if not kind.__module__.startswith("torch.nn."):
        # A subclass with its own forward may reduce in its own way.
        return Custom(loss, "sum" if loss.reduction == "sum" else "mean")
    if loss.reduction == "none":
        msg = f"the loss {loss} has reduction='none': pass reduction='mean' or 'sum' to it"
        raise ValueError(msg)
    # "batchmean" divides by the number of examples, as the "mean" of a custom loss does.
    reduction: Any = "sum" if loss.reduction == "sum" else "mean"
    if kind is nn.CrossEntropyLoss:
        return CrossEntropy(
            loss.ignore_index, loss.label_smoothing, loss.weight, reduction, class_dim=1
        )
    if kind is nn.NLLLoss:
        return NLL(loss.ignore_index, loss.weight, reduction, class_dim=1)
    if kind is nn.MSELoss:
        return MSE(reduction)
    if kind is nn.BCEWithLogitsLoss:
        return BCEWithLogits(loss.pos_weight, reduction, loss.weight)
    if kind is nn.HuberLoss:
        return Huber(loss.delta, reduction)
    if kind is nn.SmoothL1Loss and loss.beta == 1:
        return Huber(1.0, reduction)
    if kind is nn.GaussianNLLLoss:
        return GaussianNLL(loss.full, loss.eps, reduction)
    if kind in _OF_ENTRIES and loss.reduction == "mean":
        return Custom(loss, divisor=_entries)
    return Custom(loss, reduction)
