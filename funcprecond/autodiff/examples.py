"""Which axis counts the examples, whether the model couples them, and gradients one by one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from funcprecond import tree
from funcprecond.autodiff.once import renamed
from funcprecond.autodiff.recorder import Recorder
from funcprecond.layers.layer_call import LayerCall
from funcprecond.problems import Problem
from funcprecond.tree import Params

__all__ = ["are_apart", "lead", "pull_each", "refuse_coupling"]


def refuse_coupling(problem: Problem) -> None:
    """Raise unless every example's outputs depend on that example alone, as far as modules tell.

    Raises:
        ValueError: a layer makes one example's output depend on the others.
    """
    if coupling := problem.couples_examples():
        msg = (
            f"per-sample gradients are not defined: {coupling} couples the examples of a batch; "
            "put it in eval mode, or use GroupNorm"
        )
        raise ValueError(msg)


def lead(evaluation: Any) -> list[bool]:
    """For each call, whether axis 0 of its output counts the examples.

    Its length tells, unless the inputs have another axis that is N long: inside of attention the
    first axis may be the position. Then the model is run once more, without gradient, on the first
    example alone. Where it couples the examples, as a BatchNorm in training mode does, the length
    has to do.
    """
    count, calls = evaluation.count, evaluation.calls
    shapes = [x.shape for x in tree.leaves(evaluation.inputs) if isinstance(x, Tensor)]
    if not any(count in shape[1:] for shape in shapes) or evaluation.problem.couples_examples():
        return [call.shape[:1] == (count,) for call in calls]
    alone, _ = _run_part(evaluation, slice(0, 1))
    if len(alone) != len(calls):
        return [False] * len(calls)
    return [
        whole.shape[:1] == (count,) and one.shape == (1, *whole.shape[1:])
        for whole, one in zip(calls, alone, strict=True)
    ]


def are_apart(evaluation: Any) -> bool:
    """Whether a few examples without the others make the same calls and outputs as among all.

    Nothing else tells that a model which is a plain function does not couple its examples. Two from
    the middle are asked about, whose place is another among themselves: neither what comes before
    them nor what comes after, first or last, is what it was.
    """
    count, shapes = evaluation.count, [call.shape for call in evaluation.calls]
    if evaluation.problem.couples_examples() or any(s[:1] != (count,) for s in shapes):
        return False
    few = [slice(i, i + 1) for i in range(count)] if count < 4 else [slice(1, -1, count - 3)]
    return all(_are_alike(evaluation, shapes, part) for part in few)


def pull_each(
    evaluation: Any, cotangents: Any, names: Sequence[str], chunk_size: int | None
) -> Params:
    """For each example its own ``J_n^T cotangents_n``, by ``vmap`` over the model.

    See :meth:`funcprecond.Evaluation.pull_each`.
    """
    problem, params, buffers = evaluation.problem, evaluation.params, evaluation._buffers
    refuse_coupling(problem)
    count = evaluation.count
    chosen = {k: params[k] for k in names}

    def one(inputs, masks, cotangent):
        def f(sub):
            single = tree.map(lambda x, d: x.unsqueeze(0) if d == 0 else x, inputs, dims)
            recorder = Recorder({}, masks=tuple(m.unsqueeze(0) for m in masks), twice=True)
            with recorder:
                outputs, _ = problem.forward({**params, **sub}, buffers, single)
            return tree.map(lambda x: x.squeeze(0), outputs)

        return vjp(f, chosen)[1](cotangent)[0]

    dims = tree.map(
        lambda x: 0 if isinstance(x, Tensor) and x.ndim and x.shape[0] == count else None,
        evaluation.inputs,
    )
    mapped = vmap(one, (dims, 0, 0), chunk_size=chunk_size)
    try:
        return mapped(evaluation.inputs, evaluation.masks, cotangents)
    except RuntimeError as error:
        msg = (
            f"the per-sample gradients of {list(names)} could not be taken by vmap over the "
            f"model (torch: {str(error).splitlines()[0]}); rewrite that part of the model, or "
            "leave these parameters to another method with fp.partition"
        )
        raise RuntimeError(msg) from error


def _run_part(evaluation: Any, part: slice) -> tuple[list[LayerCall], Any]:
    """(calls, outputs) of a run without gradient on some of the examples alone."""
    count = evaluation.count
    inputs = tree.map(
        lambda x: x[part] if isinstance(x, Tensor) and x.ndim and x.shape[0] == count else x,
        evaluation.inputs,
    )
    params = renamed(evaluation.params)
    recorder = Recorder(params, lambda z: z, tuple(m[part] for m in evaluation.masks))
    with torch.no_grad(), recorder:
        outputs, _ = evaluation.problem.forward(params, evaluation._buffers, inputs)
    return recorder.calls, outputs


def _are_alike(evaluation: Any, shapes: Sequence[tuple[int, ...]], part: slice) -> bool:
    """Whether the calls and outputs of these examples alone are those among all."""
    try:
        calls, alone = _run_part(evaluation, part)
    except Exception:
        # A model that cannot run on so few examples, for whatever reason, cannot be asked.
        return False
    size = len(range(evaluation.count)[part])
    return [call.shape for call in calls] == [(size, *s[1:]) for s in shapes] and all(
        torch.allclose(x, y[part], rtol=0, atol=float(_rounding(y)), equal_nan=True)
        for x, y in zip(tree.leaves(alone), tree.leaves(evaluation.outputs), strict=True)
    )


def _rounding(x: Tensor) -> Tensor:
    """What the outputs of a batch and of a part of it may differ by."""
    return torch.finfo(x.dtype).eps ** 0.5 * x.abs().nan_to_num().amax()
