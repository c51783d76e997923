"""Pull-backs of the cotangents of single examples, for parameters that no layer covers.

There are three ways to the same result. ``vmap`` over the model is the fastest. Where it cannot run
the model, each example is run alone. Where an example alone is not run as it is in the batch, or
where the inputs belong to all examples together, as in a graph, the cotangents of each example are
pulled back through the whole run.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from funcprecond import tree
from funcprecond.autodiff.graph_check import nodes
from funcprecond.autodiff.once import renamed
from funcprecond.autodiff.recorder import Recorder
from funcprecond.autodiff.reminders import remind_of_route
from funcprecond.checks import listed
from funcprecond.linalg.precision import factor_dtype
from funcprecond.tracing import is_eager
from funcprecond.tree import Params, floating

__all__ = ["pull_each"]


def pull_each(
    evaluation: Any, cotangents: Sequence[Tensor], names: Sequence[str], chunk_size: int | None
) -> Params:
    """Implement :meth:`funcprecond.Evaluation.pull_each`.

    Args:
        evaluation: the run.
        cotangents: a tensor for each floating-point leaf of the outputs.
        names: the parameters to pull back to.
        chunk_size: the number of examples at a time; None for all at once.
    """
    examples, params = evaluation.examples, evaluation.params
    examples.require_apart()
    examples.check_cotangent(cotangents)
    eager = is_eager((params, evaluation.inputs, cotangents))
    used = _used(evaluation, names) if eager else list(names)
    if not used:
        found: Params = {}
    elif examples.joint:
        found = _through_the_whole_run(evaluation, cotangents, used, eager)
    elif eager:
        found = _first_route(evaluation, cotangents, used, chunk_size)
    else:
        try:
            found = _by_vmap(evaluation, cotangents, used, chunk_size)
        except Exception as error:
            if torch.compiler.is_compiling():
                raise _without_route(error, used) from error
            try:
                found = _through_the_whole_run(evaluation, cotangents, used, eager)
            except Exception:
                raise _without_route(error, used) from error
    zeros = {
        k: params[k].new_zeros((examples.count, *params[k].shape)) for k in names - found.keys()
    }
    return {k: zeros[k] if k in zeros else found[k] for k in names}


def _first_route(evaluation, cotangents, names, chunk_size):
    """Take the fastest route that works and whose rows add up to the gradient of the whole batch.

    It is remembered for the next run on the same shapes.
    """
    problem = evaluation.problem
    shapes = (x.shape if isinstance(x, Tensor) else type(x) for x in evaluation.leaves)
    key = ("route", tuple(names), problem.options(), *shapes)
    route, why = problem.remembered.get(key, (None, ""))
    if route in (None, "vmap"):
        try:
            found = _by_vmap(evaluation, cotangents, names, chunk_size)
        except Exception as error:
            route, why = "examples", f"vmap cannot run the model ({_first_line(error)})"
        else:
            if route is not None or _adds_up(evaluation, cotangents, found):
                problem.remember(key, ("vmap", ""))
                return found
            route, why = "batch", "an example alone runs otherwise than in the batch"
    if route == "examples":
        try:
            found = _one_by_one(evaluation, cotangents, names)
        except Exception as error:
            route, why = (
                "batch",
                f"{why}, and it cannot run an example alone ({_first_line(error)})",
            )
        else:
            if ("adds up", key) in evaluation.more_runs or _adds_up(evaluation, cotangents, found):
                evaluation.more_runs["adds up", key] = True
                problem.remember(key, (route, why))
                remind_of_route(problem, names, why, f"{evaluation.count} runs of the model")
                return found
            route, why = "batch", "an example alone runs otherwise than in the batch"
    problem.remember(key, (route, why))
    remind_of_route(problem, names, why, f"{evaluation.count} pull-backs through the whole batch")
    return _through_the_whole_run(evaluation, cotangents, names)


def _first_line(error: BaseException) -> str:
    line = (str(error).splitlines() or [""])[0].split(". ")[0]
    return f"{type(error).__name__}: {line}"


def _without_route(error: BaseException, names: Sequence[str]) -> RuntimeError:
    return RuntimeError(
        f"the per-sample gradients of {listed(names)} cannot be computed by vmap over the model "
        f"({_first_line(error)}), and under a transform or a compiler there is no other way: "
        "rewrite that part of the model, or measure outside of the transform"
    )


def _used(evaluation: Any, names: Sequence[str]) -> list[str]:
    """The parameters that the outputs of the run depend on. The rows of the others are zero."""
    run = evaluation._run
    if not hasattr(run, "leaves"):
        return list(names)
    # The nodes are kept alive, because the identity of a dead one may be used again.
    graph = list(nodes(floating(run.outputs)))
    reached = {id(getattr(node, "variable", node)) for node in graph}
    own = {k: run.leaves[k] for k in names}
    return [k for k, x in own.items() if id(x if x.grad_fn is None else x.grad_fn) in reached]


def _kept(evaluation: Any, make: Callable, names: Sequence[str]) -> Any:
    """What ``make(evaluation, names)`` returns, kept for the other cotangents of the evaluation."""
    key = (make, tuple(names))
    if key not in evaluation.more_runs:
        evaluation.more_runs[key] = make(evaluation, names)
    return evaluation.more_runs[key]


def _whole_graph(evaluation: Any, names: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of one more run of the whole batch, and the parameters that they depend on.

    The graph of the evaluation itself may have been freed.
    """
    chosen = set(names)
    leaves = {k: p.detach().requires_grad_(k in chosen) for k, p in evaluation.params.items()}
    with torch.enable_grad():
        outputs, _, _ = evaluation._forward(renamed(leaves), None)
    return floating(outputs), [leaves[k] for k in names]


def _adds_up(evaluation: Any, cotangents: Sequence[Tensor], rows: Params) -> bool:
    """Whether the rows of the examples add up to the pull-back of the whole batch."""
    outputs, leaves = _kept(evaluation, _whole_graph, list(rows))
    pulled = _gradients(list(zip(outputs, cotangents, strict=True)), leaves)
    # A part of the model may compute in less precision than its parameters have.
    kinds = {m.dtype for node in nodes(outputs) for m in node._input_metadata}
    kinds = [x for x in kinds if x.is_floating_point or x.is_complex]
    rounding = max((torch.finfo(x).eps for x in kinds), default=0.0) ** 0.5
    for row, g in zip(rows.values(), pulled, strict=True):
        wide = row.reshape(len(row), -1).to(factor_dtype(row))
        error = (wide.sum(0) - g.flatten()).norm()
        if not bool(error <= rounding * wide.norm(dim=1).sum()) and bool(wide.isfinite().all()):
            return False
    return True


def _split(evaluation: Any) -> tuple[list[Any], list[int | None], list[Any], list[int | None]]:
    """The inputs and the masks by example, with the axis to map over, which is 0 or None."""
    examples = evaluation.examples
    found: list[Any] = []
    for tensors, places in (
        (evaluation.leaves, examples.inputs),
        (evaluation.masks, examples.masks),
    ):
        pairs = list(zip(tensors, places, strict=True))
        found.append([x if place is None else place.split(x) for x, place in pairs])
        found.append([None if place is None else 0 for _, place in pairs])
    return tuple(found)  # pyright: ignore[reportReturnType]


def _parts(evaluation: Any, cotangents: Sequence[Tensor]) -> list[Tensor | None]:
    """The cotangents by example; None where all examples share an output."""
    places = evaluation.examples.outputs
    pairs = zip(cotangents, places, strict=True)
    return [None if place is None else place.split(u) for u, place in pairs]


def _by_vmap(evaluation, cotangents, names, chunk_size):
    problem, params, buffers = evaluation.problem, evaluation.params, evaluation._buffers
    inputs, input_axes, masks, mask_axes = _split(evaluation)
    cotangents = _parts(evaluation, cotangents)
    # Only tensors can be mapped. Other leaves, and cotangents of what all examples share, stay out.
    mapped = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    own = [i for i, u in enumerate(cotangents) if u is not None]
    spec, chosen = tree.flatten(evaluation.inputs)[1], {k: params[k] for k in names}

    def one(tensors, masks, cotangents):
        leaves = list(inputs)
        for i, x in zip(mapped, tensors, strict=True):
            leaves[i] = x

        def f(chosen):
            recorder = Recorder({}, masks=tuple(masks), twice=True)
            with recorder:
                own_params = renamed({**params, **chosen})
                outputs, _ = problem.forward(own_params, buffers, tree.unflatten(leaves, spec))
            leaves_out = floating(outputs)
            return [leaves_out[i] for i in own]

        return vjp(f, chosen)[1](cotangents)[0]

    axes = ([input_axes[i] for i in mapped], mask_axes, 0)
    return vmap(one, axes, chunk_size=chunk_size)(
        [inputs[i] for i in mapped], masks, [cotangents[i] for i in own]
    )


def _single_graphs(evaluation, names):
    """The outputs of a run on each example alone, and the parameters that they depend on."""
    problem, buffers = evaluation.problem, evaluation._buffers
    inputs, input_axes, masks, mask_axes = _split(evaluation)
    spec = tree.flatten(evaluation.inputs)[1]
    chosen = set(names)
    leaves = {k: p.detach().requires_grad_(k in chosen) for k, p in evaluation.params.items()}
    found = []
    for n in range(evaluation.examples.count):
        single = [x if a is None else x[n] for x, a in zip(inputs, input_axes, strict=True)]
        own_masks = [x if a is None else x[n] for x, a in zip(masks, mask_axes, strict=True)]
        recorder = Recorder({}, masks=tuple(own_masks), twice=True)
        with torch.enable_grad(), recorder:
            outputs, _ = problem.forward(renamed(leaves), buffers, tree.unflatten(single, spec))
        found.append(floating(outputs))
    return found, [leaves[k] for k in names]


def _one_by_one(evaluation, cotangents, names):
    cotangents = _parts(evaluation, cotangents)
    runs, leaves = _kept(evaluation, _single_graphs, names)
    found = [
        _gradients(
            [(z, u[n]) for z, u in zip(outputs, cotangents, strict=True) if u is not None], leaves
        )
        for n, outputs in enumerate(runs)
    ]
    return {k: torch.stack(parts) for k, *parts in zip(names, *found, strict=True)}


def _through_the_whole_run(evaluation, cotangents, names, eager=True):
    found = []
    outputs, leaves = _kept(evaluation, _whole_graph, names) if eager else ([], [])
    for n in range(evaluation.examples.count):
        own = []
        for u, place in zip(cotangents, evaluation.examples.outputs, strict=True):
            masked = torch.zeros_like(u)
            if place is not None:
                parts = place.split(masked)
                parts[n] = place.split(u)[n]
                masked = place.join(parts)
            own.append(masked)
        if eager:
            found.append(_gradients(list(zip(outputs, own, strict=True)), leaves))
        else:
            pulled = evaluation.pull(tree.with_floating(evaluation.outputs, own), names=names)
            found.append([pulled[k] for k in names])
    return {k: torch.stack(parts) for k, *parts in zip(names, *found, strict=True)}


def _gradients(pairs, inputs):
    pairs = [(z, u) for z, u in pairs if z.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in inputs]
    outputs, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(
        outputs, inputs, cotangents, retain_graph=True, allow_unused=True, materialize_grads=True
    )
