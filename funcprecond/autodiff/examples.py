"""Tests of which axis counts the examples and whether a model couples them; their gradients."""

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
    """Raise an error if a module of the model is known to couple the examples of a batch.

    Raises:
        ValueError: a layer makes the output of one example depend on the other examples.
    """
    if coupling := problem.couples_examples():
        msg = (
            f"per-sample gradients are not defined, because {coupling} couples the examples of a "
            "batch: put it in eval mode, or use GroupNorm"
        )
        raise ValueError(msg)


def lead(evaluation: Any) -> list[bool]:
    """Find for each recorded call whether axis 0 of its output counts the examples.

    The length of axis 0 decides, unless another axis of the inputs also has length N; then axis 0
    may be the position, as inside an attention layer. In this case, the model is run once more
    without a gradient, on the first example alone. If the model couples the examples, as a
    BatchNorm in training mode does, then the length decides in every case.
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
    """Whether a run on a few examples gives the same calls and outputs as the run on all of them.

    For a plain function, no other test can show that the model does not couple its examples. The
    second and the second to last example are run together. Compared with the whole batch, they have
    other places, fewer examples before and after them, and another first and last example. A batch
    of fewer than four examples is run one example at a time.
    """
    count, shapes = evaluation.count, [call.shape for call in evaluation.calls]
    if evaluation.problem.couples_examples() or any(s[:1] != (count,) for s in shapes):
        return False
    few = [slice(i, i + 1) for i in range(count)] if count < 4 else [slice(1, -1, count - 3)]
    return all(_are_alike(evaluation, shapes, part) for part in few)


def pull_each(
    evaluation: Any, cotangents: Any, names: Sequence[str], chunk_size: int | None
) -> Params:
    """Implement :meth:`funcprecond.Evaluation.pull_each` with ``vmap`` over the model."""
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
            f"the per-sample gradients of {list(names)} cannot be computed by vmap over the "
            f"model (torch: {str(error).splitlines()[0]}): rewrite that part of the model, or "
            "give these parameters to another method with fp.partition"
        )
        raise RuntimeError(msg) from error


def _run_part(evaluation: Any, part: slice) -> tuple[list[LayerCall], Any]:
    """Run the model without a gradient on some examples alone; return (calls, outputs)."""
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
    """Whether a run on these examples alone gives their calls and outputs in the whole batch."""
    try:
        calls, alone = _run_part(evaluation, part)
    except Exception:
        # The model cannot run on so few examples, so that nothing can be concluded.
        return False
    size = len(range(evaluation.count)[part])
    return [call.shape for call in calls] == [(size, *s[1:]) for s in shapes] and all(
        torch.allclose(x, y[part], rtol=0, atol=float(_rounding(y)), equal_nan=True)
        for x, y in zip(tree.leaves(alone), tree.leaves(evaluation.outputs), strict=True)
    )


def _rounding(x: Tensor) -> Tensor:
    """The rounding error by which the outputs of a batch and of a part of it may differ."""
    return torch.finfo(x.dtype).eps ** 0.5 * x.abs().nan_to_num().amax()
