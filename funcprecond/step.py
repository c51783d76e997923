"""A whole training step as one pure function: to be compiled, vmapped or differentiated through."""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.evidence import Evidence, MissingEvidence, Noise, observe
from funcprecond.need import is_mark
from funcprecond.problems import Problem
from funcprecond.transform import Transform, apply
from funcprecond.tree import Buffers, Params

__all__ = ["make_step", "make_update"]


def make_step(
    problem: Problem,
    opt: Transform,
    *,
    rate: float | Tensor = 1.0,
    compile: bool = False,
    donate: bool = False,
) -> Callable:
    """One whole training step as a pure function: observe, update, apply.

    Args:
        problem: what is minimised.
        opt: the method, with its learning rate, unless that is ``rate``.
        rate: see :func:`apply`.
        compile: compile it, full graph, once for each distinct set of needs.
        donate: write the results into the tensors of ``params`` and ``state`` that were passed in,
            and return those (0-d ones, such as a step counter, are new). It saves fresh memory,
            which for an element-wise method is most of the time. This is the one exception to
            purity: the old values are gone, and no gradient flows through the step. Start from a
            copy of ``problem.params``. A step that changes the structure of the state, such as
            K-FAC's first, donates nothing.

    Returns:
        ``step(params, state, batch, t, noise=None, buffers=None) -> (params, state, evidence)``. It
        can be vmapped over ensembles and differentiated through. ``noise`` comes from
        :func:`funcprecond.draw`. The evidence returned holds the loss, the outputs and the buffers;
        its ``params``, ``grads`` and ``measured`` are empty, for a gradient that nobody waits for
        leaves its memory to the new parameters. To see gradients, observe and update yourself.

    Raises:
        ValueError: ``donate`` without ``compile``; or, by the step, donated tensors that would be
            written over twice or are the problem's own.
    """

    def body(params: Params, state: Any, needs: tuple, batch: Any, noise: Noise, buffers: Buffers):
        evidence = observe(problem, params, batch, needs, noise=noise, buffers=buffers)
        state, direction = opt.update(state, evidence.grads, evidence)
        seen = Evidence({}, evidence.loss, evidence.outputs, {}, evidence.buffers, {})
        del evidence
        return apply(params, direction, rate), state, seen

    run = _driver(body, compile, donate, (problem.params, problem.buffers))

    def step(
        params: Params,
        state: Any,
        batch: Any,
        t: int,
        noise: Noise | None = None,
        buffers: Buffers | None = None,
    ) -> tuple[Params, Any, Evidence]:
        noise = Noise((), {}) if noise is None else noise
        buffers = problem.buffers if buffers is None else buffers
        return run(params, state, opt.needs(t), batch, noise, buffers)

    return step


def make_update(
    opt: Transform,
    *,
    rate: float | Tensor = 1.0,
    compile: bool = False,
    donate: bool = False,
) -> Callable:
    """The part of a step after the gradient, for gradients that come from somewhere else.

    Args:
        opt: a method that needs the gradient only, with its intervals.
        rate, compile, donate: as for :func:`make_step`.

    Returns:
        ``update(params, state, grads, t) -> (params, state)``; ``t`` is a host integer counted
        from 0.

    Raises:
        ValueError: as :func:`make_step`.
        MissingEvidence: by the update, if the method needs more than the gradient.
    """

    def body(params: Params, state: Any, needs: tuple, grads: Params):
        missing = [n for n in needs if not is_mark(n)]
        if missing:
            msg = f"{missing[0]} cannot be measured without a batch: use fp.make_step"
            raise MissingEvidence(msg)
        nothing = torch.zeros(())
        evidence = Evidence(params, nothing, nothing, grads, {}, dict.fromkeys(needs, ()))
        state, direction = opt.update(state, grads, evidence)
        return apply(params, direction, rate), state

    run = _driver(body, compile, donate, ())

    def update(params: Params, state: Any, grads: Params, t: int) -> tuple[Params, Any]:
        return run(params, state, opt.needs(t), grads)

    return update


def _driver(body: Callable, compile: bool, donate: bool, owned: Any) -> Callable:
    """``body(params, state, needs, *inputs)``, compiled for each distinct set of needs if asked."""
    if donate and not compile:
        msg = "donate=True is for compile=True: nothing else writes over tensors"
        raise ValueError(msg)
    if not compile:
        return body
    compiled: dict[tuple, Callable] = {}

    def run(params: Params, state: Any, needs: tuple, *inputs: Any):
        if needs not in compiled:
            if donate:
                _check_donation((params, state), (owned, inputs))

            def whole(params, state, *inputs):
                new_params, new_state, *rest = body(params, state, needs, *inputs)
                if not donate:
                    return new_params, new_state, *rest
                # Memory of their own, for an output or a buffer can be a view of a parameter.
                rest = [tree.map(torch.clone, x) for x in rest]
                return *tree.write_over((params, state), (new_params, new_state)), *rest

            compiled[needs] = _compiled(whole)
        return compiled[needs](params, state, *inputs)

    return run


def _check_donation(donated: Any, kept: Any) -> None:
    mine = [id(x) for x in tree.leaves(donated)]
    others = {id(x) for x in tree.leaves(kept)}
    if len(set(mine)) < len(mine) or not others.isdisjoint(mine):
        msg = (
            "a donated tensor is in two places, or belongs to the problem or the batch: at first "
            "pass copies, {k: p.clone() for k, p in problem.params.items()}"
        )
        raise ValueError(msg)


def _compiled(function: Callable) -> Callable:
    # The compiler counts recompilations by code object, over all closures that share one; this copy
    # has a count of its own.
    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, closure=function.__closure__
    )
    return torch.compile(own, fullgraph=True, dynamic=False)
