"""Needs: what a method asks to be measured on a batch, as plain hashable values.

To measure something new, write a :class:`Need`; nothing else changes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.problems import Problem
from funcprecond.tree import Params

__all__ = ["Every", "Need", "Turn", "is_mark"]


class Need:
    """Something to measure: a frozen, hashable dataclass that says what.

    Two methods with equal needs share one measurement.

    Attributes:
        layers: whether the layers' inputs and output gradients must be recorded.
        twice: whether products with the Hessian or the Jacobian are taken.
        gives: the type of the value, by which :func:`funcprecond.compose` tells whether a
            representation can take it in.
    """

    layers: ClassVar[bool] = False
    twice: ClassVar[bool] = False
    gives: ClassVar[type] = object

    def draw(
        self, problem: Problem, params: Params, batch: Any, generator: torch.Generator | None
    ) -> Any:
        """The random numbers that the measurement takes, as a tree of tensors; none by default."""
        return ()

    def measure(self, evaluation: Evaluation, noise: Any) -> Any:
        """The value: pure, and from the shared evaluation; it never runs the model itself."""
        return ()


@dataclasses.dataclass(frozen=True)
class Every(Need):
    """The mark by which ``needs(t)`` tells ``update`` that an interval has passed.

    Nothing is measured. The mark is due at every step before ``start``, then at each multiple of
    ``steps``.

    Attributes:
        what: what is due, such as "refresh".
        steps: the interval, at least 1.
        start: until this step it is due every time. Statistics of the first steps change quickly,
            and a first one of rank one makes a poor preconditioner for a whole interval.
    """

    what: str
    steps: int = 1
    start: int = 0

    def __post_init__(self):
        if self.steps < 1 or self.start < 0:
            msg = f"{self.what}: the interval must be at least 1 and start at least 0, not {self}"
            raise ValueError(msg)

    def due(self, t: int) -> tuple[Need, ...]:
        """``(self,)`` if it is due at step ``t``, a host integer counted from 0; else ``()``."""
        return (self,) if t < self.start or t % self.steps == 0 else ()


@dataclasses.dataclass(frozen=True)
class Turn(Need):
    """The mark of a staggered interval: at each step the ``slot``-th share of the work is due.

    Attributes:
        what: what is due, such as "refresh".
        steps: the interval, which is also the number of shares.
        slot: whose turn it is, from 0.
    """

    what: str
    steps: int
    slot: int

    def share(self, costs: Sequence[float]) -> list[int]:
        """The items of this slot, when all are dealt out so that the slots cost about the same."""
        loads, mine = [0.0] * self.steps, []
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            slot = min(range(self.steps), key=loads.__getitem__)
            loads[slot] += costs[i]
            if slot == self.slot:
                mine.append(i)
        return sorted(mine)


def is_mark(need: Need) -> bool:
    """Whether a need is a mark of an interval, for which nothing is measured."""
    return isinstance(need, (Every, Turn))
