"""Needs: hashable values that state what a method measures on a batch.

To measure something new, write a subclass of :class:`Need`; no other code has to change.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.autodiff.part import Part
from funcprecond.layers.layer_call import LayerCall
from funcprecond.problems import Problem
from funcprecond.tree import Params

__all__ = ["Every", "Need", "NotDue", "Owned", "Turn", "is_mark"]


class Need:
    """A measurement on a batch, stated as a frozen, hashable dataclass.

    The fields of a subclass are the options of the measurement. Methods with equal needs share one
    measurement.

    Attributes:
        layers: whether the measurement uses the inputs and output gradients of the layers, so that
            the forward run must record them.
        twice: whether the measurement takes products with the Hessian or the Jacobian.
        differentiates: whether the measurement takes derivatives other than the gradient, so that
            the graph of the run must be kept.
        frees_run: whether the measurement takes its derivatives once and for all, so that the last
            one of a run may free its graph.
        gives: the type of the measured value. :func:`funcprecond.compose` compares it with the type
            that a representation accepts.
    """

    layers: ClassVar[bool] = False
    twice: ClassVar[bool] = False
    differentiates: ClassVar[bool] = True
    frees_run: ClassVar[bool] = False
    gives: ClassVar[type] = object

    def takes_gradient(self, call: LayerCall, inputs: Tensor) -> bool:
        """Whether the measurement may use the gradient of the loss in the output of a layer.

        Args:
            call: a recorded call of the layer.
            inputs: its input.
        """
        return self.layers

    def draw(
        self, problem: Problem, params: Params, batch: Any, generator: torch.Generator | None
    ) -> Any:
        """Draw the random numbers of the measurement.

        Args:
            problem, params, batch: the problem, and the point and the batch of the measurement.
            generator: the source of randomness, or None.

        Returns:
            A tree of tensors, which is empty by default.

        Raises:
            ValueError: random numbers are needed and ``generator`` is None.
        """
        return ()

    def measure(self, evaluation: Evaluation, noise: Any) -> Any:
        """Compute the value of the measurement, as a pure function.

        Args:
            evaluation: the forward run that all needs share. The measurement takes all derivatives
                from it and does not run the model itself.
            noise: the random numbers from :meth:`draw`.

        Returns:
            The measured value, of the type :attr:`gives`.
        """
        return ()


@dataclasses.dataclass(frozen=True)
class Every(Need):
    """A mark in ``needs(t)`` that makes ``update`` do some work at step ``t``.

    Nothing is measured for it. The mark is due at every step before ``start``, and then at each
    multiple of ``steps``.

    Attributes:
        what: the work that is due, such as "refresh".
        steps: the interval, in steps, at least 1.
        start: the mark is due at every step before this one. Statistics change quickly during the
            first steps, and a first statistic of rank one would be a poor preconditioner for a
            whole interval.

    Raises:
        ValueError: ``steps`` is less than 1 or ``start`` is negative.

    Example:
        >>> import funcprecond as fp
        >>> refresh = fp.Every("refresh", steps=4, start=2)
        >>> [t for t in range(10) if refresh.due(t)]
        [0, 1, 4, 8]
    """

    what: str
    steps: int = 1
    start: int = 0

    def __post_init__(self):
        if self.steps < 1 or self.start < 0:
            msg = (
                f"the interval of {self.what!r} must be at least 1 and start at least 0, not "
                f"{self.steps} and {self.start}"
            )
            raise ValueError(msg)

    def due(self, t: int) -> tuple[Need, ...]:
        """Return ``(self,)`` if the mark is due at a step, and ``()`` otherwise.

        Args:
            t: the step, a Python integer that counts from 0.

        Returns:
            A tuple of one need or none, to be joined with the other needs of the step.
        """
        return (self,) if t < self.start or t % self.steps == 0 else ()

    def marks(self, t: int) -> tuple[Need, ...]:
        """Return ``(self,)`` if the mark is due at a step, and ``(NotDue(self),)`` otherwise.

        A method lists these among its needs, so that :func:`funcprecond.evidence.is_due` can tell
        a mark that is not due from needs that were not passed to :func:`funcprecond.observe`.

        Args:
            t: the step, a Python integer that counts from 0.

        Returns:
            A tuple of one need.
        """
        return self.due(t) or (NotDue(self),)


@dataclasses.dataclass(frozen=True)
class NotDue(Need):
    """A mark that another mark was asked for, and is not due at this step.

    Attributes:
        mark: the other mark.
    """

    mark: Need


@dataclasses.dataclass(frozen=True)
class Turn(Need):
    """A mark that one share of the work of a staggered interval is due.

    The work is divided into as many shares as the interval has steps, and one share is due at each
    step.

    Attributes:
        what: the work that is due, such as "refresh".
        steps: the interval, in steps, which is also the number of shares.
        slot: the index of the share that is due, from 0.
    """

    what: str
    steps: int
    slot: int

    def share(self, costs: Sequence[float]) -> list[int]:
        """Select the items of this share, such that all shares cost about the same.

        Args:
            costs: the cost of each item, in any unit.

        Returns:
            The indices of the items, in increasing order.
        """
        loads, mine = [0.0] * self.steps, []
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            slot = min(range(self.steps), key=loads.__getitem__)
            loads[slot] += costs[i]
            if slot == self.slot:
                mine.append(i)
        return sorted(mine)


@dataclasses.dataclass(frozen=True)
class Owned(Need):
    """The measurement of another need for some parameters only, as if the others were constants.

    Attributes:
        need: the other need.
        owner: a hashable function from the parameters to the names of those to measure.
    """

    need: Need
    owner: Callable[[Params], tuple[str, ...]]

    # A class attribute of other needs; here it is that of the other need.
    @property
    def layers(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See :class:`Need`."""
        return self.need.layers

    @property
    def twice(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See :class:`Need`."""
        return self.need.twice

    @property
    def differentiates(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See :class:`Need`."""
        return self.need.differentiates

    @property
    def frees_run(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See :class:`Need`."""
        return self.need.frees_run

    def takes_gradient(self, call: LayerCall, inputs: Tensor) -> bool:
        return self.need.takes_gradient(call, inputs)

    def draw(
        self, problem: Problem, params: Params, batch: Any, generator: torch.Generator | None
    ) -> Any:
        own = {k: params[k] for k in self.owner(params)}
        return self.need.draw(problem, own, batch, generator)

    def measure(self, evaluation: Evaluation, noise: Any) -> Any:
        part = Part(evaluation, self.owner(evaluation.params))
        return self.need.measure(part, noise)  # pyright: ignore[reportArgumentType]


def is_mark(need: Need) -> bool:
    """Whether a need is only a mark of an interval, for which nothing is measured."""
    return isinstance(need, (Every, NotDue, Turn))
