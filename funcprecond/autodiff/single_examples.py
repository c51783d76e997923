"""Pull-backs of the cotangents of single examples, for parameters that no layer covers.

There are three ways to the same result. ``vmap`` over the model is the fastest. Where it cannot run
the model, each example is run alone. Where the inputs belong to all examples together, as in a
graph, the cotangents of each example are pulled back through the whole run.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from funcprecond import tree
from funcprecond.autodiff.once import renamed
from funcprecond.autodiff.recorder import Recorder
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
    examples = evaluation.examples
    examples.require_apart()
    examples.check_cotangent(cotangents)
    eager = is_eager((evaluation.params, evaluation.inputs, cotangents))
    if examples.joint:
        return _through_the_whole_run(evaluation, cotangents, names)
    parts = [
        None if place is None else place.split(u)
        for u, place in zip(cotangents, examples.outputs, strict=True)
    ]
    try:
        return _by_vmap(evaluation, parts, names, chunk_size)
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        if eager:
            return _one_by_one(evaluation, parts, names)
        msg = (
            f"the per-sample gradients of {list(names)} cannot be computed by vmap over the "
            f"model (torch: {(str(error).splitlines() or [''])[0]}), and under a transform or a "
            "compiler there is no other way: rewrite that part of the model, or measure outside of "
            "the transform"
        )
        raise RuntimeError(msg) from error


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


def _by_vmap(evaluation, cotangents, names, chunk_size):
    problem, params, buffers = evaluation.problem, evaluation.params, evaluation._buffers
    inputs, input_axes, masks, mask_axes = _split(evaluation)
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


def _one_by_one(evaluation, cotangents, names):
    problem, buffers = evaluation.problem, evaluation._buffers
    inputs, input_axes, masks, mask_axes = _split(evaluation)
    spec = tree.flatten(evaluation.inputs)[1]
    leaves = {k: p.detach().requires_grad_(k in names) for k, p in evaluation.params.items()}
    found = []
    for n in range(evaluation.examples.count):
        single = [x if a is None else x[n] for x, a in zip(inputs, input_axes, strict=True)]
        own_masks = [x if a is None else x[n] for x, a in zip(masks, mask_axes, strict=True)]
        recorder = Recorder({}, masks=tuple(own_masks), twice=True)
        with torch.enable_grad(), recorder:
            outputs, _ = problem.forward(renamed(leaves), buffers, tree.unflatten(single, spec))
        pairs = [
            (z, u[n])
            for z, u in zip(floating(outputs), cotangents, strict=True)
            if u is not None and z.requires_grad
        ]
        found.append(_gradients(pairs, [leaves[k] for k in names]))
    return {k: torch.stack(parts) for k, *parts in zip(names, *found, strict=True)}


def _through_the_whole_run(evaluation, cotangents, names):
    found = []
    for n in range(evaluation.examples.count):
        own = []
        for u, place in zip(cotangents, evaluation.examples.outputs, strict=True):
            masked = torch.zeros_like(u)
            if place is not None:
                masked[n] = u[n]
            own.append(masked)
        pulled = evaluation.pull(tree.with_floating(evaluation.outputs, own))
        found.append([pulled[k] for k in names])
    return {k: torch.stack(parts) for k, *parts in zip(names, *found, strict=True)}


def _gradients(pairs, inputs):
    if not pairs:
        return [torch.zeros_like(x) for x in inputs]
    outputs, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(
        outputs, inputs, cotangents, allow_unused=True, materialize_grads=True
    )
