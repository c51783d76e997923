"""How a statistic is carried over the steps: replaced, averaged or summed.

The argument ``decay`` of all methods selects one of these:

* ``None``: the newest measurement replaces the old one.
* A float or a 0-d tensor in [0, 1): an exponential moving average, in which ``decay`` is the weight
  of the old value. A normalizer makes it unbiased from the first step on.
* A :class:`RisingDecay`: a plain mean at first, then a moving average.
* ``"sum"``: the sum over all steps.
"""

import dataclasses
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor

from funcprecond.tree import state

__all__ = [
    "Average",
    "Decay",
    "RisingDecay",
    "accumulate",
    "check_decay",
    "divisor",
    "normalizer_after",
    "present",
    "separated",
]


@dataclasses.dataclass(frozen=True)
class RisingDecay:
    """The decay ``min(1 - 1/k, limit)`` at the k-th measurement, counted from 1.

    The first ``1 / (1 - limit)`` measurements have equal weights, whereas a constant decay gives
    the newest ones more weight. This is the average of the K-FAC paper (Martens & Grosse, arXiv
    1503.05671, section 5).

    Attributes:
        limit: the largest decay, a number in [0, 1): the weight of the old value after the first
            measurements.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.kfac(decay=fp.RisingDecay(0.95))
    """

    limit: float | Tensor = 0.95


@dataclasses.dataclass(frozen=True)
class _Shares:
    """The factors by which the old and the new value are multiplied."""

    old: Tensor
    new: float | Tensor


Decay = float | Tensor | RisingDecay | Literal["sum"] | None
Present = float | Tensor | _Shares | Literal["sum"] | None


@state
class Average:
    """A statistic that is carried over the steps.

    Attributes:
        total: a tensor, or dicts and tuples of tensors.
        normalizer: the number by which the total is divided, a 0-d tensor that starts at 0.
    """

    total: Any
    normalizer: Tensor

    def include(self, new: Any, decay: Decay) -> "Average":
        """The statistic after one more measurement.

        Args:
            new: the measurement, shaped like ``total``.
            decay: see :mod:`funcprecond.representation.average`.

        Returns:
            The new statistic.
        """
        now = present(self.normalizer, decay)
        total = _over(lambda old, x: accumulate(old, x, now), self.total, new)
        return Average(total, normalizer_after(self.normalizer, now))

    def value(self) -> Any:
        """The average, ``total / normalizer``."""
        return _over(lambda x, _: x / self.normalizer, self.total, self.total)


def present(normalizer: Tensor, decay: Decay) -> Present:
    """The decay for the next measurement, if the old measurements have this normalizer.

    A rising decay gives each measurement the share ``1 - limit``, so that the normalizer of k
    measurements is ``k (1 - limit)``. The old measurements are scaled down where it would exceed 1.
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
    """The normalizer after one more measurement, a 0-d tensor that starts at 0."""
    if isinstance(decay, _Shares):
        return decay.old * old + decay.new
    if decay is None or isinstance(decay, str):
        return torch.ones_like(old)
    return decay * old + (1 - decay)


def separated(
    shared: Tensor, own: dict[str, Tensor], known: Collection[str], found: Collection[str]
) -> dict[str, Tensor]:
    """The normalizers of the blocks that do not share one, before a measurement.

    All blocks share a normalizer as long as each measurement has all of them. A block that one
    leaves out, or that is new, has a normalizer of its own from then on.

    Args:
        shared: the normalizer that the other blocks share.
        own: the normalizers of single blocks so far.
        known: the blocks of the old measurements.
        found: the blocks of the new measurement.

    Returns:
        The normalizers of single blocks.
    """
    if not known:
        return own
    absent = {k: shared.clone() for k in known if k not in found and k not in own}
    first = {k: torch.zeros_like(shared) for k in found if k not in known}
    return {**own, **absent, **first}


def divisor(normalizer: Tensor) -> Tensor:
    """The normalizer, or 1 where it is zero, because there was no measurement."""
    return torch.where(normalizer > 0, normalizer, 1.0)


def check_decay(decay: Decay) -> None:
    """Raise ValueError unless ``decay`` is one of the values in the docstring of this file."""
    value = decay.limit if isinstance(decay, RisingDecay) else decay
    if value is None or isinstance(value, Tensor) or value == "sum":
        return
    if isinstance(value, str) or not 0 <= value < 1:
        msg = (
            "decay must be None, 'sum', a RisingDecay or a number in [0, 1), the weight of the old "
            f"value, not {decay!r}"
        )
        raise ValueError(msg)


def _over(function, x: Any, y: Any) -> Any:
    # This is written out, because torch's traversal of trees slows small steps.
    if isinstance(x, dict):
        return {k: _over(function, v, y[k]) for k, v in x.items()}
    if isinstance(x, tuple):
        return tuple(_over(function, a, b) for a, b in zip(x, y, strict=True))
    return function(x, y)
