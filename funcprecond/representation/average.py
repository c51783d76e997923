"""How a statistic is carried over steps: replaced, averaged or summed.

One argument, ``decay``, says it everywhere:

* ``None``: local, the newest measurement replaces the old one;
* a float or 0-d tensor in [0, 1): an exponential moving average, with ``decay`` as the weight of the
  OLD value. Its normalizer makes it unbiased from the first step on;
* a :class:`RisingDecay`: a plain mean at first, then such an average;
* ``"sum"``: the sum over all steps.
"""

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from funcprecond.tree import state

__all__ = ["Average", "Decay", "RisingDecay", "accumulate", "check_decay", "normalizer_after"]


@dataclasses.dataclass(frozen=True)
class RisingDecay:
    """The decay ``min(1 - 1/k, limit)`` at the k-th measurement, counted from 1.

    The first ``1 / (1 - limit)`` measurements have a plain mean, where a constant decay favours the
    newest. It is the average of the K-FAC paper (Martens & Grosse, arXiv 1503.05671, section 5).

    Attributes:
        limit: the weight of the old value in the end.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.kfac(decay=fp.RisingDecay(0.95))
    """

    limit: float | Tensor = 0.95


@dataclasses.dataclass(frozen=True)
class _Shares:
    """What the old and the new value are multiplied by."""

    old: Tensor
    new: float | Tensor


Decay = float | Tensor | RisingDecay | Literal["sum"] | None
Present = float | Tensor | _Shares | Literal["sum"] | None


@state
class Average:
    """A statistic over steps.

    Attributes:
        total: a tensor, or dicts and tuples of them.
        normalizer: what the total is divided by, a 0-d tensor that starts at 0.
    """

    total: Any
    normalizer: Tensor

    def include(self, new: Any, decay: Decay) -> "Average":
        """The statistic after one more measurement, shaped like ``total``."""
        now = present(self.normalizer, decay)
        total = _over(lambda old, x: accumulate(old, x, now), self.total, new)
        return Average(total, normalizer_after(self.normalizer, now))

    def value(self) -> Any:
        """``total / normalizer``."""
        return _over(lambda x, _: x / self.normalizer, self.total, self.total)


def present(normalizer: Tensor, decay: Decay) -> Present:
    """The decay for the next measurement, where the old ones have this normalizer.

    With a share of ``1 - limit`` for each of k measurements the normalizer of a rising decay is
    ``k (1 - limit)``; it is kept from growing above 1.
    """
    if not isinstance(decay, RisingDecay):
        return decay
    full = decay.limit / torch.where(normalizer > 0, normalizer, 1.0)
    return _Shares(torch.where(normalizer > 0, full.clamp_max(1.0), 1.0), 1 - decay.limit)


def accumulate(total: Tensor | None, new: Tensor, decay: Present) -> Tensor:
    """The total after a new measurement; ``total`` is None before the first."""
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


def normalizer_after(old: Tensor, decay: Present) -> Tensor:
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


def _over(function, x: Any, y: Any) -> Any:
    # By hand: in a small step torch's walk over trees would be felt.
    if isinstance(x, dict):
        return {k: _over(function, v, y[k]) for k, v in x.items()}
    if isinstance(x, tuple):
        return tuple(_over(function, a, b) for a, b in zip(x, y, strict=True))
    return function(x, y)
