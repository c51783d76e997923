"""Measuring: what a method needs to know of a batch, as plain data.

A method *declares* what it needs, :func:`observe` measures exactly that and the gradient, sharing
one forward run, and the method's ``update`` is tensor algebra on the result. To measure something
new, write a :class:`Need`: nothing else changes.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.autodiff.recorder import Capture
from funcprecond.problems import Buffers, Params, Problem
from funcprecond.tree import state

__all__ = ["Every", "Evidence", "MissingEvidence", "Need", "Noise", "Turn", "draw", "observe"]


class Need:
    """Something to measure: a frozen, hashable dataclass that says what.

    Two methods with equal needs share one measurement.

    Attributes:
        taps: whether the layers' inputs and output gradients must be recorded.
        twice: whether products with the Hessian or the Jacobian are taken.
    """

    taps: ClassVar[bool] = False
    twice: ClassVar[bool] = False

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

    Nothing is measured. It is due at every step before ``start``, then at each multiple of
    ``steps``.

    Attributes:
        what: what is due, such as "refresh".
        steps: the interval, at least 1.
        start: until this step it is due every time: statistics of the first steps change quickly,
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


class MissingEvidence(LookupError):
    """A method was updated without a measurement that it needs."""


@state
class Evidence:
    """What was observed of one batch at one point.

    Attributes:
        params: where.
        loss: the loss, a 0-d tensor.
        outputs: the model's outputs.
        grads: the gradient of the loss.
        buffers: the model's buffers after this batch: pass them to the next ``observe``.
        measured: the value of each need. Values that are functions live for one step only.
    """

    params: Params
    loss: Tensor
    outputs: Any
    grads: Params
    buffers: Buffers
    measured: dict[Need, Any]

    def __contains__(self, need: Need) -> bool:
        return need in self.measured

    def __getitem__(self, need: Need) -> Any:
        """The value of ``need``; raises :class:`MissingEvidence` if it was not measured."""
        if need not in self.measured:
            have = ", ".join(str(n) for n in self.measured) or "nothing"
            msg = (
                f"{need} was not measured, only {have}: pass opt.needs(t) to fp.observe and its "
                "result to opt.update(state, evidence.grads, evidence)"
            )
            raise MissingEvidence(msg)
        return self.measured[need]


@state
class Noise:
    """All random numbers of one observation.

    Attributes:
        masks: dropout masks, in the order in which the model draws them.
        needs: what each need draws.
    """

    masks: tuple[Tensor, ...]
    needs: dict[Need, Any]


def draw(
    problem: Problem,
    params: Params,
    batch: Any,
    needs: Iterable[Need] = (),
    *,
    generator: torch.Generator | None = None,
    buffers: Buffers | None = None,
) -> Noise:
    """Draw all random numbers that :func:`observe` would, before it runs.

    Compiled and vmapped steps take the result; an open loop can leave it to ``observe``. A model
    with dropout is run once without gradient, to see which masks it takes.

    Raises:
        ValueError: random numbers are needed and there is no generator.
    """
    # In the order of ``observe``, so that one seed means one observation either way.
    drawn = _draw(problem, params, batch, needs, generator)
    training = problem.module is None or problem.module.training
    masks = ()
    if problem.draws.get(training, True):
        capture = Capture({}, generator=generator)
        with torch.no_grad(), capture:
            start = problem.buffers if buffers is None else buffers
            problem.forward(params, start, problem.split(batch)[0])
        masks = tuple(capture.masks)
        problem.draws[training] = bool(masks)
    return Noise(masks, drawn)


def observe(
    problem: Problem,
    params: Params,
    batch: Any,
    needs: Iterable[Need] = (),
    *,
    noise: Noise | None = None,
    generator: torch.Generator | None = None,
    buffers: Buffers | None = None,
) -> Evidence:
    """Measure the loss, its gradient and all ``needs`` on one batch, from one forward run.

    Args:
        problem, params, batch: what is observed, and where. Nothing of it is changed.
        needs: what to measure; a method's are ``opt.needs(t)``.
        noise: the random numbers, from :func:`draw`; drawn from ``generator`` if not given.
        generator: an explicit source of randomness; not needed if nothing is random.
        buffers: the model's buffers; at first the problem's own, then ``evidence.buffers``.

    Returns:
        The :class:`Evidence`.

    Raises:
        ValueError: random numbers are needed and there is no generator; the batch is empty.
        KeyError, RuntimeError: ``params`` do not fit the model.
    """
    needs = tuple(dict.fromkeys(needs))
    if noise is None:
        noise = Noise((), _draw(problem, params, batch, needs, generator))
    evaluation = Evaluation(
        problem,
        params,
        batch,
        buffers=buffers,
        masks=noise.masks,
        generator=generator,
        taps=any(n.taps for n in needs),
        twice=any(n.twice for n in needs),
        keep=any(not isinstance(n, (Every, Turn)) for n in needs),
    )
    grads = evaluation.grads
    return Evidence(
        params=params,
        loss=evaluation.loss,
        outputs=evaluation.outputs,
        grads=grads,
        buffers=evaluation.buffers,
        measured={n: n.measure(evaluation, noise.needs.get(n, ())) for n in needs},
    )


def _draw(problem, params, batch, needs, generator) -> dict[Need, Any]:
    drawn = {n: n.draw(problem, params, batch, generator) for n in needs}
    return {n: value for n, value in drawn.items() if tree.leaves(value)}
