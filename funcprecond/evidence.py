"""Measuring: what a method needs to know of a batch, as plain data.

A method *declares* what it needs, :func:`observe` measures exactly that and the gradient, sharing
one forward run, and the method's ``update`` is tensor algebra on the result. To measure something
new, write a :class:`Need`: nothing else changes.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.autodiff.recorder import Recorder
from funcprecond.need import Need, is_mark
from funcprecond.problems import Problem
from funcprecond.tree import Buffers, Params, state

__all__ = ["Evidence", "MissingEvidence", "Noise", "draw", "observe"]


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
    if problem.draws_masks.get(training, True):
        recorder = Recorder({}, generator=generator)
        with torch.no_grad(), recorder:
            start = problem.buffers if buffers is None else buffers
            problem.forward(params, start, problem.split(batch)[0])
        masks = tuple(recorder.masks)
        problem.draws_masks[training] = bool(masks)
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
        layers=any(n.layers for n in needs),
        twice=any(n.twice for n in needs),
        keep=any(not is_mark(n) for n in needs),
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
