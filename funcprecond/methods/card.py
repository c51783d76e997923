"""Cards: each method describes its own row of the table of methods."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from funcprecond.checks import checked
from funcprecond.transform import Transform

__all__ = ["CARDS", "Card", "card"]

Build = TypeVar("Build", bound=Callable[..., Transform])


@dataclasses.dataclass(frozen=True)
class Card:
    """One row of the table of methods.

    Attributes:
        name: the name of the builder, which users write.
        title: the method, with its authors and year.
        curvature: the curvature matrix C, in the letters of :mod:`funcprecond.methods.table`.
        representation: the granularity (full, layer, unit, element) and the form of storage.
        solver: how ``P g`` is computed, from C of the current batch (L, local) or from an average
            over the steps (G, global).
        build: the builder, with keyword-only hyperparameters; None for a method that is planned.
        learning_rate: the first learning rate that the comparison tries. It is the best power of
            √10 on the task ``digits-mlp`` with the builder's defaults, or with ``options``.
        carries_momentum: whether the direction contains a running mean of the gradients. If it
            does, the comparison chains no momentum after the method.
        options: hyperparameters for small problems, for builders whose defaults are for large ones.
        starred: whether the method is one of the five in the case studies of the ASDL paper.
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

    The decorator also writes the row of the table into the builder's docstring, after its first
    line, so that ``help(fp.caspr)`` shows it, and checks the builder's numbers, see
    :func:`funcprecond.checks.checked`.

    Args:
        title, curvature, representation, solver: the columns of the table, see :class:`Card`.
        learning_rate, carries_momentum, options, starred: see :class:`Card`.

    Returns:
        A decorator that adds the card to :data:`CARDS` and returns the checked builder.
    """

    def enter(build: Build) -> Build:
        build = checked(build)
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
            first, _, rest = build.__doc__.partition("\n\n")
            row = f"Curvature: {curvature}. Representation: {representation}. Solver: {solver}."
            build.__doc__ = f"{first}\n\n    {row}\n\n{rest}"
        return build

    return enter
