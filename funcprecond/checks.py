"""Checks of a user's arguments; each error message contains the name of the argument."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["RANGES", "Range", "at_least", "below", "checked", "listed", "one_of"]

# The number of names in a message, where there are more.
SHOWN = 3


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


def listed(names: Iterable[Any]) -> str:
    """List names in a message, shortened to the first three if there are more than four.

    Args:
        names: the names, such as those of parameters.

    Returns:
        The list in words.

    Example:
        >>> listed(["fc.weight", "fc.bias"])
        "['fc.weight', 'fc.bias']"
        >>> listed(f"layers.{i}.weight" for i in range(100))
        "['layers.0.weight', 'layers.1.weight', 'layers.2.weight'] and 97 others"
        >>> listed([])
        'none'
    """
    names = list(names)
    if len(names) <= SHOWN + 1:
        return str(names) if names else "none"
    return f"{names[:SHOWN]} and {len(names) - SHOWN} others"


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


@dataclasses.dataclass(frozen=True)
class Range:
    """The allowed values of a hyperparameter.

    Attributes:
        low, high: the bounds.
        open_low, open_high: whether the bound itself is not allowed.
        whole: whether only integers are allowed.
        noun: what the values are, for the message.
    """

    low: float = 0.0
    high: float = math.inf
    open_low: bool = False
    open_high: bool = True
    whole: bool = False
    noun: str = "a number"

    def __contains__(self, value: Any) -> bool:
        if self.whole and not isinstance(value, int):
            return False
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return "positive" if self.open_low else f"{self.noun} of at least {self.low:g}"
        return f"{self.noun} in [{self.low:g}, {self.high:g}{'])'[self.open_high]}"


NONNEGATIVE, POSITIVE, SHARE = Range(), Range(open_low=True), Range(high=1.0)
COUNT = Range(1, whole=True, noun="an integer")
COUNT_OR_NONE = Range(0, whole=True, noun="an integer")
INTERVAL = Range(1, whole=True, noun="an interval, a whole number of steps")
RANGES = {
    **dict.fromkeys(("damping", "epsilon", "weight_decay", "l2", "coefficient"), NONNEGATIVE),
    **dict.fromkeys(("tol", "power", "min_curvature", "rate", "zeta"), NONNEGATIVE),
    **dict.fromkeys(("initial", "limit", "bound"), POSITIVE),
    **dict.fromkeys(("decay", "momentum", "betas"), SHARE),
    **dict.fromkeys(("every", "refresh_every", "damping_every", "gamma_every"), INTERVAL),
    **dict.fromkeys(("samples", "history", "window", "max_iter", "trials", "steps"), COUNT),
    **dict.fromkeys(("examples", "rank", "sketch"), COUNT),
    **dict.fromkeys(("start", "backtracking", "merge", "block", "max_dim"), COUNT_OR_NONE),
}
"""The range of each hyperparameter, by its name, which means the same in all methods."""

# These methods invert a curvature matrix that can be singular.
INVERT = frozenset(
    {
        "adaptive_kfac",
        "diagonal_ng",
        "ekfac",
        "engd",
        "eva",
        "eva_s",
        "foof",
        "kfac",
        "kflr",
        "layerwise_ng",
        "mfac",
        "natural_gradient",
        "seng",
        "singd",
        "skfac",
        "smw_gn",
        "smw_ng",
        "spring",
        "sr",
        "tonga",
        "tonga_unit",
        "unit_ng",
    }
)


Build = TypeVar("Build", bound=Callable[..., Any])


def checked(build: Build) -> Build:
    """Decorate the builder of a method with a check of its numbers, by :data:`RANGES`.

    Tensors are not checked, because their values may be unknown under a transform, and reading them
    would wait for the device. Where the default of an argument is a bound, the bound is allowed.

    Args:
        build: a builder whose arguments have the names of :data:`RANGES`.

    Returns:
        A function with the same signature, which raises ValueError if an argument is out of range.

    Example:
        >>> import funcprecond as fp
        >>> fp.kfac(damping=0.0)
        Traceback (most recent call last):
        ...
        ValueError: damping must be positive, not 0.0: kfac inverts a matrix that can be singular
    """
    parameters = inspect.signature(build).parameters
    ranges = {k: RANGES[k] for k in parameters if k in RANGES}
    reason = ""
    if build.__name__ in INVERT:
        ranges["damping"] = POSITIVE
        reason = f": {build.__name__} inverts a matrix that can be singular"
    for name, allowed in ranges.items():
        if parameters[name].default == allowed.high:
            ranges[name] = dataclasses.replace(allowed, open_high=False)
    positional = [k for k, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]

    @functools.wraps(build)
    def with_check(*args: Any, **kwargs: Any) -> Any:
        for name, value in (*zip(positional, args, strict=False), *kwargs.items()):
            if name in ranges:
                for x in value if isinstance(value, tuple) else (value,):
                    if isinstance(x, (int, float)) and x not in ranges[name]:
                        why = reason if name == "damping" else ""
                        msg = f"{name} must be {ranges[name]}, not {x!r}{why}"
                        raise ValueError(msg)
        return build(*args, **kwargs)

    return with_check  # pyright: ignore[reportReturnType]
