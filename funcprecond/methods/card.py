"""Cards: what each method says of its row in the table of methods."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from funcprecond.transform import Transform

__all__ = ["CARDS", "Card", "card"]

Build = TypeVar("Build", bound=Callable[..., Transform])


@dataclasses.dataclass(frozen=True)
class Card:
    """One row of the table of methods.

    Attributes:
        name: what users write, the builder's name.
        title: the method, with authors and year.
        curvature: which matrix C.
        representation: at what granularity and how it is stored.
        solver: how ``P g`` is computed; L for local, G for global.
        build: the builder, with keyword-only hyperparameters; None for a method that is planned.
        learning_rate: where the comparison's sweep of learning rates begins. It is the best of
            10^(k/2) for whole k on the task ``digits-mlp`` at the builder's own defaults, or at
            ``options`` where these are given.
        carries_momentum: whether the direction contains a running mean of gradients, so that no
            momentum is to be chained after it.
        options: hyperparameters for small problems, where the defaults are for large ones.
        starred: whether the method is one of the five of ASDL's case studies.
    """

    name: str
    title: str
    curvature: str
    representation: str
    solver: str
    build: Callable[..., Transform] | None = None
    learning_rate: float = 0.1
    carries_momentum: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    starred: bool = False

    @property
    def has_intervals(self) -> bool:
        """Whether the builder takes ``every`` and ``refresh_every``."""
        names = inspect.signature(self.build).parameters if self.build else {}
        return "refresh_every" in names


CARDS: dict[str, Card] = {}
"""The cards of all methods that work, by name."""


def card(
    title: str,
    *,
    curvature: str,
    representation: str,
    solver: str,
    learning_rate: float,
    carries_momentum: bool = False,
    options: Mapping[str, Any] | None = None,
    starred: bool = False,
) -> Callable[[Build], Build]:
    """Decorate the builder of a method with its card.

    The row of the table becomes a part of the builder's docstring, after its first line, so that
    ``help(fp.caspr)`` tells it.

    Args:
        title, curvature, representation, solver, learning_rate, carries_momentum, options,
            starred: see :class:`Card`.

    Returns:
        A decorator that enters the builder in :data:`CARDS` and returns it.
    """

    def enter(build: Build) -> Build:
        CARDS[build.__name__] = Card(
            build.__name__,
            title,
            curvature,
            representation,
            solver,
            build,
            learning_rate,
            carries_momentum,
            options or {},
            starred,
        )
        if build.__doc__:
            row = f"    {title}. Curvature: {curvature}. Representation: {representation}. "
            first, _, rest = build.__doc__.partition("\n\n")
            build.__doc__ = f"{first}\n\n{row}Solver: {solver}.\n\n{rest}"
        return build

    return enter
