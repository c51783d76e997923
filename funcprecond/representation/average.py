"""How a statistic is carried over steps: replaced, averaged or summed.

One argument, ``decay``, everywhere:

* ``None``: local, the newest measurement replaces the old one;
* a float or 0-d tensor in [0, 1): an exponential moving average; it is the weight of the OLD value.
  A :func:`weight` goes with it, so that ``total / weight`` is unbiased from the first step;
* a :class:`RisingDecay`: a plain mean at first, then such an average;
* ``"sum"``: the sum over all steps.
"""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Decay", "RisingDecay", "accumulate", "weight"]


@dataclasses.dataclass(frozen=True)
class RisingDecay:
    """The decay ``min(1 - 1/k, limit)`` at the k-th measurement, counted from 1.

    The first ``1 / (1 - limit)`` measurements have a plain mean, where a constant decay favours the
    newest. It is that of the K-FAC paper (Martens & Grosse, arXiv 1503.05671, section 5).

    Attributes:
        limit: the weight of the old value in the end.
    """

    limit: float | Tensor = 0.95


@dataclasses.dataclass(frozen=True)
class _Shares:
    old: Tensor
    new: float | Tensor


Decay = float | Tensor | RisingDecay | Literal["sum"] | None
Present = float | Tensor | _Shares | Literal["sum"] | None


def at(weight: Tensor, decay: Decay) -> Present:
    """The decay for the next measurement, where the old ones have this :func:`weight`.

    With a share of ``1 - limit`` for each of k measurements their weight is ``k (1 - limit)``; it
    is kept from growing above 1.
    """
    if not isinstance(decay, RisingDecay):
        return decay
    full = decay.limit / torch.where(weight > 0, weight, 1.0)
    return _Shares(torch.where(weight > 0, full.clamp_max(1.0), 1.0), 1 - decay.limit)


def accumulate(total: Tensor | None, new: Tensor, decay: Present) -> Tensor:
    """The total after a new measurement, None before the first; see the module's docstring."""
    if total is not None:
        new = new.to(total.dtype)
    if isinstance(decay, _Shares):
        new = decay.new * new
        return new if total is None else decay.old.to(total.dtype) * total + new
    if decay is None or (total is None and isinstance(decay, str)):
        return new
    if total is None:
        return (1 - decay) * new  # pyright: ignore[reportOperatorIssue]
    if isinstance(decay, str):
        return total + new
    if isinstance(decay, float):
        return torch.lerp(new, total, decay)
    return decay * total + (1 - decay) * new


def weight(old: Tensor, decay: Present) -> Tensor:
    """What the total is divided by after one more measurement, a 0-d tensor that starts at 0."""
    if isinstance(decay, _Shares):
        return decay.old * old + decay.new
    if decay is None or isinstance(decay, str):
        return torch.ones_like(old)
    return decay * old + (1 - decay)


def check_decay(decay: Decay) -> None:
    """Raise ValueError unless ``decay`` is None, "sum", a 0-d tensor, or a float in [0, 1)."""
    value = decay.limit if isinstance(decay, RisingDecay) else decay
    if value is None or isinstance(value, Tensor) or value == "sum":
        return
    if isinstance(value, str) or not 0 <= value < 1:
        msg = f"decay must be None, 'sum' or in [0, 1), the weight of the old value, not {decay!r}"
        raise ValueError(msg)
