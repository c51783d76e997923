"""How a statistic is carried over steps: replaced, averaged or summed.

One argument, ``decay``, everywhere:

* ``None``: local, the newest measurement replaces the old one;
* a float or 0-d tensor in [0, 1): an exponential moving average; it is the weight of the OLD value.
  A :func:`weight` goes with it, so that ``total / weight`` is unbiased from the first step;
* ``"sum"``: the sum over all steps.
"""

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Decay", "accumulate", "weight"]

Decay = float | Tensor | Literal["sum"] | None


def accumulate(total: Tensor | None, new: Tensor, decay: Decay) -> Tensor:
    """The total after a new measurement, None before the first; see the module's docstring."""
    if total is not None:
        new = new.to(total.dtype)
    if decay is None or (total is None and isinstance(decay, str)):
        return new
    if total is None:
        return (1 - decay) * new  # pyright: ignore[reportOperatorIssue]
    if isinstance(decay, str):
        return total + new
    if isinstance(decay, float):
        return torch.lerp(new, total, decay)
    return decay * total + (1 - decay) * new


def weight(old: Tensor, decay: Decay) -> Tensor:
    """What the total is divided by after one more measurement, a 0-d tensor that starts at 0."""
    if decay is None or isinstance(decay, str):
        return torch.ones_like(old)
    return decay * old + (1 - decay)


def check_decay(decay: Decay) -> None:
    """Raise ValueError unless ``decay`` is None, "sum", a 0-d tensor, or a float in [0, 1)."""
    if decay is None or isinstance(decay, Tensor) or decay == "sum":
        return
    if isinstance(decay, str) or not 0 <= decay < 1:
        msg = f"decay must be None, 'sum' or in [0, 1), the weight of the old value, not {decay!r}"
        raise ValueError(msg)
