"""Checks of a user's arguments; each error message contains the name of the argument."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

__all__ = ["at_least", "below", "one_of"]


def one_of(choices: Iterable[Any], **arguments: Any) -> None:
    """Raise ValueError unless each argument is one of the choices.

    Args:
        choices: the allowed values.
        **arguments: the arguments by name.

    Raises:
        ValueError: an argument is not a string among the choices.

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
    """Raise ValueError unless each argument is a number of at least ``low``.

    Tensors are not checked, because their values may be unknown under a transform.

    Args:
        low: the least allowed value.
        **arguments: the arguments by name.

    Raises:
        ValueError: an argument is less than ``low``, or not a number (NaN).
    """
    for name, value in arguments.items():
        if not isinstance(value, Tensor) and not value >= low:
            msg = f"{name} must be at least {low}, not {value!r}"
            raise ValueError(msg)


def below(high: float, **arguments: Any) -> None:
    """Raise ValueError unless each argument is a number in [0, ``high``).

    Tensors are not checked, because their values may be unknown under a transform.

    Args:
        high: the bound, which is not an allowed value itself.
        **arguments: the arguments by name.

    Raises:
        ValueError: an argument is negative, at least ``high``, or not a number (NaN).
    """
    for name, value in arguments.items():
        if not isinstance(value, Tensor) and not 0 <= value < high:
            msg = f"{name} must be in [0, {high}), not {value!r}"
            raise ValueError(msg)
