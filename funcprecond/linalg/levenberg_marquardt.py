"""Levenberg and Marquardt's rule: damping that follows how well the quadratic model predicts."""

import torch
from torch import Tensor

__all__ = ["levenberg_marquardt", "reduction_ratio"]


def reduction_ratio(change: Tensor, predicted: Tensor) -> Tensor:
    """``change / predicted``: how the loss changed, over how the model said it would.

    1 where the model is exact; -inf where the model promised no descent or the loss is not finite,
    so that the damping grows.
    """
    good = (predicted < 0) & torch.isfinite(change)
    return torch.where(good, change / torch.where(good, predicted, -1), -torch.inf)


def levenberg_marquardt(
    damping: Tensor, ratio: Tensor, *, up: float = 1.5, down: float = 2 / 3
) -> Tensor:
    """The next damping: times ``up`` for a ratio below 1/4, times ``down`` above 3/4.

    Martens (2010) takes 3/2 and 2/3, Ren & Goldfarb (2019) 1.01 and 1/1.01. Kept in [1e-12, 1e12].
    """
    less = torch.where(ratio > 0.75, damping * down, damping)
    return torch.where(ratio < 0.25, damping * up, less).clamp(1e-12, 1e12)
