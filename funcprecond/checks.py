"""Checks of what a user passes, with the argument's name in the sentence."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

__all__ = ["at_least", "below", "one_of"]


def one_of(choices: Iterable[Any], **arguments: Any) -> None:
    """Raise ValueError unless each argument is one of the choices.

    Example:
        >>> one_of(("qr", "eigh"), refresh="svd")
        Traceback (most recent call last):
        ...
        ValueError: refresh must be 'qr' or 'eigh', not 'svd'
    """
    names = [repr(c) for c in choices]
    for name, value in arguments.items():
        if not isinstance(value, str) or repr(value) not in names:
            listed = " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
            msg = f"{name} must be {listed}, not {value!r}"
            raise ValueError(msg)


def at_least(low: float, **arguments: Any) -> None:
    """Raise ValueError unless each argument is a number of at least ``low``; tensors pass."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor) and not value >= low:
            msg = f"{name} must be at least {low}, not {value!r}"
            raise ValueError(msg)


def below(high: float, **arguments: Any) -> None:
    """Raise ValueError unless each argument is a number in [0, ``high``); tensors pass."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor) and not 0 <= value < high:
            msg = f"{name} must be in [0, {high}), not {value!r}"
            raise ValueError(msg)
