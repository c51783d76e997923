"""A whole training step as one pure function, which can be compiled, vmapped and differentiated."""

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.autodiff.origin import trusted
from funcprecond.evidence import Evidence, MissingEvidence, Noise, observe, remind_of_buffers
from funcprecond.need import is_mark
from funcprecond.problems import Problem
from funcprecond.tracing import is_traced
from funcprecond.transform import Transform, apply
from funcprecond.tree import Buffers, Params

__all__ = ["make_step", "make_update"]

# The first version of torch whose compiler traces the steps of all methods.
COMPILES = (2, 13)


def make_step(
    problem: Problem,
    opt: Transform,
    *,
    rate: float | Tensor = 1.0,
    compile: bool = False,
    donate: bool = False,
) -> Callable:
    """Make one whole training step as a pure function that observes, updates and applies.

    Args:
        problem: the training problem.
        opt: the method. It includes the learning rate, unless ``rate`` is given.
        rate: the learning rate, see :func:`funcprecond.apply`.
        compile: whether to compile the step with ``torch.compile``, as a full graph and once for
            each distinct set of needs and each shape of a batch.
        donate: whether to write the results into the tensors of ``params`` and ``state`` that were
            passed in, and return these tensors. This avoids the allocation of new memory, which
            takes most of the time of an element-wise method. It is the only exception to purity:
            the old values are lost, and no gradient flows through the step. Start from a copy of
            ``problem.params``. 0-d tensors, such as a step counter, are returned as new tensors. A
            step that changes the structure of the state, such as the first step of K-FAC, writes
            over nothing.

    Returns:
        A function ``step(params, state, batch, t, noise=None, buffers=None) -> (params, state,
        evidence)``. It can be vmapped over an ensemble, and differentiated. ``t`` is a Python
        integer that counts from 0, and ``noise`` comes from :func:`funcprecond.draw`. The returned
        evidence contains the loss, the outputs and the buffers. Its ``params``, ``grads`` and
        ``measured`` are empty, so that the new parameters can reuse the memory of the gradient. To
        get gradients, call :func:`funcprecond.observe` and ``opt.update`` instead.

    Raises:
        ValueError: ``donate`` is True and ``compile`` is False. The step also raises it if a tensor
            to be donated occurs twice, or belongs to the problem or to the other arguments.
        RuntimeError: ``compile`` is True, and torch is older than 2.13.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(4, 3), fp.losses.cross_entropy)
        >>> batch = torch.ones(8, 4), torch.zeros(8, dtype=torch.int64)
        >>> opt = fp.adam()
        >>> step = fp.make_step(problem, opt, rate=0.01)
        >>> params, state, evidence = step(problem.params, opt.init(problem.params), batch, 0)
        >>> params["weight"].shape
        torch.Size([3, 4])
    """

    def body(params: Params, state: Any, needs: tuple, batch: Any, noise: Noise, buffers: Buffers):
        evidence = observe(problem, params, batch, needs, noise=noise, buffers=buffers)
        if is_traced():
            evidence = dataclasses.replace(evidence, origin=trusted(evidence.grads))
        state, direction = opt.update(state, evidence.grads, evidence)
        seen = Evidence({}, evidence.loss, evidence.outputs, {}, evidence.buffers, {})
        del evidence
        return apply(params, direction, rate), state, seen

    def prepare(
        params: Params, state: Any, needs: tuple, batch: Any, noise: Noise, buffers: Buffers
    ):
        # An eager run refuses what a compiled one does not notice, such as random numbers without
        # noise, and finds the examples, for which a compiled one cannot compare values.
        layers = any(n.layers for n in needs) and not problem.by_points
        twice = any(n.twice for n in needs)
        known = {"buffers": buffers, "masks": noise.masks, "layers": layers, "twice": twice}
        seen = Evaluation(problem, params, batch, **known)
        if layers:
            _ = seen.examples

    run = _driver(body, compile, donate, (problem.params, problem.buffers), prepare)

    def step(
        params: Params,
        state: Any,
        batch: Any,
        t: int,
        noise: Noise | None = None,
        buffers: Buffers | None = None,
    ) -> tuple[Params, Any, Evidence]:
        noise = Noise((), {}) if noise is None else noise
        known = problem.buffers if buffers is None else buffers
        params, state, seen = run(params, state, opt.needs(t), batch, noise, known)
        if buffers is None and known:
            remind_of_buffers(problem, seen.buffers)
        return params, state, seen

    return step


def make_update(
    opt: Transform,
    *,
    rate: float | Tensor = 1.0,
    compile: bool = False,
    donate: bool = False,
) -> Callable:
    """Make the part of a step that follows the gradient, for gradients from another source.

    Args:
        opt: a method that needs only the gradient. Its intervals are respected.
        rate, compile, donate: see :func:`make_step`.

    Returns:
        A function ``update(params, state, grads, t) -> (params, state)``, in which ``t`` is a
        Python integer that counts from 0.

    Raises:
        ValueError: ``donate`` is True and ``compile`` is False. The returned function also raises
            it if a tensor to be donated occurs twice or is one of the gradients.
        MissingEvidence: the returned function raises it if the method needs more than the gradient.

    Example:
        >>> import torch, funcprecond as fp
        >>> opt = fp.sgd()
        >>> update = fp.make_update(opt, rate=0.5)
        >>> params = {"w": torch.tensor([1.0])}
        >>> params, state = update(params, opt.init(params), {"w": torch.tensor([4.0])}, 0)
        >>> params["w"]
        tensor([-1.])
    """

    def body(params: Params, state: Any, needs: tuple, grads: Params):
        missing = [n for n in needs if not is_mark(n)]
        if missing:
            msg = f"the method needs {missing[0]}, which is measured on a batch: use fp.make_step"
            raise MissingEvidence(msg)
        nothing = torch.zeros(())
        evidence = Evidence(params, nothing, nothing, grads, {}, dict.fromkeys(needs, ()))
        state, direction = opt.update(state, grads, evidence)
        return apply(params, direction, rate), state

    run = _driver(body, compile, donate, ())

    def update(params: Params, state: Any, grads: Params, t: int) -> tuple[Params, Any]:
        return run(params, state, opt.needs(t), grads)

    return update


def _driver(
    body: Callable, compile: bool, donate: bool, owned: Any, prepare: Callable | None = None
) -> Callable:
    """Return ``body``, or a function that compiles it for each set of needs and shapes of inputs.

    Args:
        body: ``(params, state, needs, *inputs) -> (params, state, ...)``.
        compile, donate: see :func:`make_step`.
        owned: tensors that must not be donated.
        prepare: is called with the arguments of ``body`` before it is compiled.
    """
    if donate and not compile:
        msg = "donate=True requires compile=True: only a compiled step writes over its arguments"
        raise ValueError(msg)
    if not compile:
        return body
    version = tuple(int(x) for x in torch.__version__.split(".")[:2])
    if version < COMPILES:
        msg = (
            f"compile=True needs torch {'.'.join(map(str, COMPILES))} or newer, and this is torch "
            f"{torch.__version__}, whose compiler cannot trace a step: leave it out"
        )
        raise RuntimeError(msg)
    compiled: dict[tuple, Callable] = {}

    def run(params: Params, state: Any, needs: tuple, *inputs: Any):
        # A function may be compiled a few times only, so that batches of each shape have their own.
        shapes = (x.shape for x in tree.leaves(inputs) if isinstance(x, Tensor))
        key = (needs, *shapes)
        if key not in compiled:
            if prepare is not None:
                prepare(params, state, needs, *inputs)
            if donate:
                _check_donation((params, state), (owned, inputs))

            def whole(params, state, *inputs):
                new_params, new_state, *rest = body(params, state, needs, *inputs)
                if not donate:
                    return new_params, new_state, *rest
                # Cloned, because an output or a buffer can be a view of a parameter.
                rest = [tree.map(torch.clone, x) for x in rest]
                return *tree.write_over((params, state), (new_params, new_state)), *rest

            compiled[key] = _compiled(whole)
        return compiled[key](params, state, *inputs)

    return run


def _check_donation(donated: Any, kept: Any) -> None:
    mine = [id(x) for x in tree.leaves(donated)]
    others = {id(x) for x in tree.leaves(kept)}
    if len(set(mine)) < len(mine) or not others.isdisjoint(mine):
        msg = (
            "a tensor to be donated occurs in two places, or belongs to the problem or the batch: "
            "at the first step pass copies, {k: p.clone() for k, p in problem.params.items()}"
        )
        raise ValueError(msg)


def _compiled(function: Callable) -> Callable:
    # The compiler counts recompilations per code object, which all closures of a function share.
    # This copy has its own count.
    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, closure=function.__closure__
    )
    return torch.compile(own, fullgraph=True, dynamic=False)
