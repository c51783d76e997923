"""The Levenberg-Marquardt rule: damping that adapts to how well the quadratic model predicts."""

import torch
from torch import Tensor

__all__ = ["levenberg_marquardt", "reduction_ratio"]


def reduction_ratio(change: Tensor, predicted: Tensor) -> Tensor:
    """``change / predicted``: the change of the loss divided by the change that the model predicts.

    It is 1 if the model is exact. It is 1/2, with which the damping stays, if the model predicts no
    change. It is -inf, with which the damping grows, if the model predicts an increase or the loss
    is not finite.
    """
    good = (predicted < 0) & torch.isfinite(change)
    ratio = torch.where(good, change / torch.where(good, predicted, -1), -torch.inf)
    return torch.where(predicted == 0, 0.5, ratio)


def levenberg_marquardt(
    damping: Tensor, ratio: Tensor, *, up: float = 1.5, down: float = 2 / 3
) -> Tensor:
    """The next damping: multiplied by ``up`` for a ratio below 1/4, by ``down`` for one above 3/4.

    Martens (2010) uses 3/2 and 2/3, Ren & Goldfarb (2019) use 1.01 and 1/1.01. The result is
    clamped to [1e-12, 1e12].
    """
    less = torch.where(ratio > 0.75, damping * down, damping)
    return torch.where(ratio < 0.25, damping * up, less).clamp(1e-12, 1e12)
