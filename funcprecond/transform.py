"""The one type of every method and of everything chained around it, and the step that drives it."""

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.evidence import Evidence, MissingEvidence, Noise, observe
from funcprecond.linalg import treemath
from funcprecond.need import Every, Need, Turn
from funcprecond.problems import Problem
from funcprecond.tree import Buffers, Params

__all__ = ["Transform", "apply", "chain", "gradient_only", "make_step", "make_update", "stateless"]


class Transform(NamedTuple):
    """Turns gradients into directions, by three pure functions.

    Attributes:
        init: ``params -> state``. A state is a tree of tensors.
        update: ``(state, grads, evidence=None) -> (new state, direction)``. A direction has the
            sign and the dtypes of the gradient. Methods that need the gradient only work without
            evidence, and then measure and refresh at every call.
        needs: ``t -> needs``: what to observe at step ``t``, a host integer counted from 0.
    """

    init: Callable[[Params], Any]
    update: Callable[..., tuple[Any, Params]]
    needs: Callable[[int], tuple[Need, ...]] = lambda t: ()


def gradient_only(init: Callable, update: Callable) -> Transform:
    """A transform whose ``update(state, grads)`` asks for nothing beside the gradient."""
    return Transform(init, lambda state, grads, evidence=None: update(state, grads))


def stateless(function: Callable[[Params], Params]) -> Transform:
    """A transform that maps each gradient on its own."""
    return gradient_only(lambda params: (), lambda state, grads: (state, function(grads)))


def chain(*transforms: Transform) -> Transform:
    """Apply transforms one after another: the direction of one is the gradient of the next.

    The order carries meaning. ``chain(adam(), weight_decay(0.1), scale(1e-3))`` decays the weights
    themselves (decoupled, AdamW); ``chain(weight_decay(0.1), adam(), scale(1e-3))`` adds the decay
    to the gradient that Adam sees (an L2 penalty). The learning rate comes last.
    """

    def init(params):
        return tuple(t.init(params) for t in transforms)

    def update(state, grads, evidence=None):
        new = []
        for transform, old in zip(transforms, state, strict=True):
            inner, grads = transform.update(old, grads, evidence)
            new.append(inner)
        return tuple(new), grads

    def needs(t):
        return tuple(dict.fromkeys(n for transform in transforms for n in transform.needs(t)))

    return Transform(init, update, needs)


def apply(params: Params, direction: Params, rate: float | Tensor = 1.0) -> Params:
    """``params - rate * direction``, as new tensors of the parameters' dtypes.

    Args:
        params, direction: with the same names.
        rate: a learning rate; here it saves the pass over memory that :func:`funcprecond.scale`
            takes.

    Raises:
        KeyError: the direction lacks a parameter.
    """
    missing = params.keys() - direction.keys()
    if missing:
        msg = f"the direction has no entry for {sorted(missing)}"
        raise KeyError(msg)
    return treemath.add(params, treemath.cast(direction, params), -rate)


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
        missing = [n for n in needs if not isinstance(n, (Every, Turn))]
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


def counter(like: Params) -> Tensor:
    """A step counter at zero: a 0-d integer tensor on the parameters' device."""
    first = next(iter(like.values()), torch.zeros(()))
    return first.new_zeros((), dtype=torch.int64)
