"""Measurements on a batch, as plain data.

A method declares what it needs. :func:`observe` measures exactly these needs and the gradient, all
from one shared forward run, and the method's ``update`` is tensor algebra on the result. To measure
something new, write a subclass of :class:`Need`; no other code has to change.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.autodiff.origin import Origin, recorded
from funcprecond.autodiff.recorder import Recorder
from funcprecond.checks import listed
from funcprecond.need import Need, NotDue, is_mark
from funcprecond.problems import Problem
from funcprecond.tracing import in_transform, is_traced
from funcprecond.tree import Buffers, Params, state, static

__all__ = [
    "Evidence",
    "MissingEvidence",
    "Noise",
    "draw",
    "is_due",
    "observe",
    "remind_of_buffers",
    "required",
]


class MissingEvidence(LookupError):
    """The error for an update of a method without a measurement that the method needs."""


@state
class Evidence:
    """The measurements on one batch at one point.

    ``evidence[need]`` is the value of a need, and ``need in evidence`` is whether it was measured.

    Attributes:
        params: the parameters at which the batch was evaluated.
        loss: the loss, a 0-d tensor.
        outputs: the outputs of the model. Under a transform, which returns tensors only, ``()``
            stands for whatever is none.
        grads: the gradient of the loss, shaped like ``params``.
        buffers: the model's buffers after this batch; pass them to the next :func:`observe`.
        measured: the value of each need. A value that is a function, such as that of
            :class:`funcprecond.curvature.objective.Objective`, is valid for one step only.
        origin: which tensors the gradient was when it was measured; None if nobody knows.
    """

    params: Params
    loss: Tensor
    outputs: Any
    grads: Params
    buffers: Buffers
    measured: dict[Need, Any]
    origin: Origin | None = static(default=None)

    def __contains__(self, need: Need) -> bool:
        return need in self.measured

    def __getitem__(self, need: Need) -> Any:
        """Return the measured value of a need.

        Args:
            need: one of the needs that were passed to :func:`observe`.

        Returns:
            The value, of the type ``need.gives``.

        Raises:
            MissingEvidence: the need was not measured.
        """
        if need not in self.measured:
            msg = f"{need} was not measured"
            raise _missing(msg, self)
        return self.measured[need]

    def is_own(self, grads: Params) -> bool:
        """Whether a gradient is known to be the measured one, and not changed since.

        Other measurements describe the measured gradient, and may be used in its place only then.
        The answer is False after a change in place, in a traced function of your own, and where
        processes communicate. Changes through ``x.data`` or NumPy are not noticed.

        Args:
            grads: the gradient that ``update`` was given.
        """
        return self.origin is not None and self.origin.holds(grads)

    def part(self, measured: dict[Need, Any]) -> "Evidence":
        """The same evidence with other measurements."""
        return Evidence(
            self.params,
            self.loss,
            self.outputs,
            self.grads,
            self.buffers,
            measured,
            self.origin,
        )


def _missing(what: str, evidence: Evidence) -> MissingEvidence:
    have = ", ".join(str(n) for n in evidence.measured) or "nothing"
    return MissingEvidence(
        f"{what}; the evidence contains {have}. Pass opt.needs(t) to fp.observe, with the number t "
        "of the step, and its result to opt.update(state, evidence.grads, evidence)"
    )


def is_due(mark: Need, evidence: Evidence | None, *needs: Need) -> bool:
    """Whether the work of a mark is due in this update.

    Args:
        mark: the mark, which the method lists among its needs by its ``marks(t)``.
        evidence: the evidence that ``update`` was called with. Without any, all work is due.
        *needs: the needs that the work uses, which the message names.

    Returns:
        True if the mark is due. False if it was asked for and is not due.

    Raises:
        MissingEvidence: the mark was not asked for, so that nobody knows.
    """
    if evidence is None or mark in evidence.measured:
        return True
    if NotDue(mark) in evidence.measured:
        return False
    named = "".join(f"{need} and " for need in needs)
    msg = f"this method needs {named}{mark}, which was not asked for"
    raise _missing(msg, evidence)


def required(evidence: Evidence | None, *needs: Need) -> Evidence:
    """Return the evidence, or raise an error if there is none.

    Args:
        evidence: the evidence that ``update`` was called with, or None.
        *needs: the needs of the method, which the message names.

    Returns:
        The evidence.

    Raises:
        MissingEvidence: ``update`` was called without evidence.
    """
    if evidence is None:
        msg = (
            f"this method needs {' and '.join(map(str, needs)) or 'the parameters'} in addition to "
            "the gradient: call opt.update(state, evidence.grads, evidence) with the evidence that "
            "fp.observe(problem, params, batch, opt.needs(t)) returns"
        )
        raise MissingEvidence(msg)
    return evidence


@state
class Noise:
    """All random numbers of one observation.

    Attributes:
        masks: the dropout masks, in the order in which the model draws them.
        needs: the random numbers of each need that has any.
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
    """Draw all random numbers that :func:`observe` needs, before it runs.

    Compiled and vmapped steps take the result as an argument. In an ordinary training loop,
    :func:`observe` can draw the numbers itself; the same seed gives the same numbers either way.

    Args:
        problem, params, batch: the problem, and the point and the batch that will be observed.
        needs: the needs that will be measured, such as ``opt.needs(t)``.
        generator: the source of randomness. It is required if the needs or the model draw random
            numbers.
        buffers: the model's buffers; by default the initial ones of the problem.

    Returns:
        The :class:`Noise`. A model with dropout is run forward once without a gradient, to find
        the shapes of its masks. Whether a model has dropout is found at the first call.

    Raises:
        ValueError: random numbers are needed and there is no generator.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(4, 3), fp.losses.cross_entropy)
        >>> batch = torch.ones(8, 4), torch.zeros(8, dtype=torch.int64)
        >>> opt, generator = fp.kfac(), torch.Generator().manual_seed(0)
        >>> noise = fp.draw(problem, problem.params, batch, opt.needs(0), generator=generator)
        >>> evidence = fp.observe(problem, problem.params, batch, opt.needs(0), noise=noise)
    """
    # The needs draw before the model, as in ``observe``, so that one seed gives the same numbers.
    drawn = _draw(problem, params, batch, needs, generator)
    masks, options = (), problem.options()
    if problem.draws_masks.get(options, True):
        recorder = Recorder({}, generator=generator)
        with torch.no_grad(), recorder:
            start = problem.buffers if buffers is None else buffers
            problem.forward(params, start, problem.split(batch)[0])
        masks = tuple(recorder.masks)
        problem.draws_masks.clear()
        problem.draws_masks[options] = bool(masks)
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
        problem, params, batch: the problem, and the point and the batch to observe. None of them is
            changed.
        needs: the needs to measure; those of a method at step ``t`` are ``opt.needs(t)``.
        noise: the random numbers, from :func:`draw`. By default they are drawn from ``generator``.
        generator: the source of randomness. It is not required if nothing is random.
        buffers: the model's buffers. They are the initial ones of the problem by default; in a
            training loop, pass ``evidence.buffers`` of the step before. If a model that updates its
            buffers is observed twice without them, a warning says so.

    Returns:
        The :class:`Evidence`. Costs one gradient, and the cost of each need.

    Raises:
        ValueError: random numbers are needed and there is no generator, or the batch is empty.
        KeyError: the names in ``params`` or ``buffers`` do not fit the model.
        RuntimeError: the shapes in ``params`` do not fit the model, or the model does something
            that cannot be observed, such as activation checkpointing or a draw from torch's global
            generator.
        NotImplementedError: torch has no derivative for a part of the model or the loss.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(4, 3), fp.losses.cross_entropy)
        >>> batch = torch.ones(8, 4), torch.zeros(8, dtype=torch.int64)
        >>> opt = fp.adam()
        >>> evidence = fp.observe(problem, problem.params, batch, opt.needs(0))
        >>> evidence.grads["weight"].shape
        torch.Size([3, 4])
    """
    needs = tuple(dict.fromkeys(needs))
    if noise is None:
        noise = Noise((), _draw(problem, params, batch, needs, generator))
    differentiate = [n for n in needs if n.differentiates and not is_mark(n)]
    evaluation = Evaluation(
        problem,
        params,
        batch,
        buffers=buffers,
        masks=noise.masks,
        generator=generator,
        layers=any(n.layers for n in needs),
        twice=any(n.twice for n in needs),
        keep=bool(differentiate),
        takes_gradient=lambda call, x: any(n.takes_gradient(call, x) for n in needs),
    )
    grads = evaluation.grads
    measured = {}
    for need in needs:
        evaluation.is_last = need in differentiate[-1:] and all(n.frees_run for n in differentiate)
        measured[need] = need.measure(evaluation, noise.needs.get(need, ()))
    evidence = Evidence(
        params=params,
        loss=evaluation.loss,
        outputs=_returned(evaluation.outputs),
        grads=grads,
        buffers=evaluation.buffers,
        measured=measured,
        origin=recorded(grads),
    )
    if buffers is None and problem.buffers:
        remind_of_buffers(problem, evaluation.buffers)
    return evidence


def _returned(outputs: Any) -> Any:
    """The outputs, where a transform returns tensors only, without anything else among them."""
    if isinstance(outputs, Tensor) or not in_transform():
        return outputs
    return tree.map(lambda x: x if isinstance(x, Tensor) else (), outputs)


def remind_of_buffers(problem: Problem, buffers: Buffers) -> None:
    """Warn of a training loop that runs the model from its initial buffers at each step.

    Args:
        problem: the problem, whose buffers were not passed to a run for the first or second time.
        buffers: the buffers after the run.
    """
    if is_traced() or problem.reminded["buffers"] > 1:
        return
    problem.reminded["buffers"] += 1
    if problem.reminded["buffers"] == 1:
        return
    changed = [k for k, b in buffers.items() if not torch.equal(b, problem.buffers[k])]
    if changed:
        msg = (
            f"the model updates its buffers {listed(changed)} in every run, and was run twice from "
            "the initial ones, so that eval mode would not know what was learned: in a training "
            "loop, pass buffers=evidence.buffers of the step before. Where the initial ones are "
            "meant, pass buffers=problem.buffers"
        )
        warnings.warn(msg, stacklevel=3)


def _draw(problem, params, batch, needs, generator) -> dict[Need, Any]:
    drawn = {n: n.draw(problem, params, batch, generator) for n in needs}
    return {n: value for n, value in drawn.items() if tree.leaves(value)}
