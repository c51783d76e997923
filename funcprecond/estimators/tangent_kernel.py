"""The empirical neural tangent kernel: the inner products of the rows of the model's Jacobian J."""

import dataclasses
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.curvature.layer_statistics import ExampleRows
from funcprecond.losses import Loss
from funcprecond.problems import Problem
from funcprecond.representation.gram import Gram
from funcprecond.tree import Params

__all__ = ["ntk"]


def ntk(
    problem: Problem,
    params: Params,
    batch: Any,
    other: Any = None,
    *,
    kind: Literal["full", "sum"] = "full",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The empirical neural tangent kernel ``J J^T`` of a model whose output is a single tensor.

    J is the Jacobian of the outputs in the parameters. The output of an example has O entries, in
    the order in which a batch of this example alone has them.

    Args:
        problem, params, batch: the problem, the parameters at which its model is differentiated,
            and a batch of N examples. The loss is not used.
        other: a second batch of M examples, for the kernel between the two batches; ``batch`` by
            default.
        kind: "full" for the whole kernel, or "sum" for its trace over the entries of an output.
        generator: draws the dropout masks.

    Returns:
        (N, O, M, O), or (N, M) with "sum". Costs one pull-back to the layers' outputs for each of
        the O entries. In addition it costs, per layer, O products with "sum" or O² with "full",
        each over pairs of positions or over formed rows of J, whichever is cheaper. J is not
        formed, except for parameters in no layer; O times the layers' output gradients are in
        memory.

    Raises:
        ValueError: the model couples the examples of a batch, ``kind`` is unknown, or dropout masks
            are needed and there is no generator.
        TypeError: the model's output is not a single tensor.
        RuntimeError: some parameter is in no layer, and ``vmap`` cannot compute its per-sample
            gradients.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(4, 3), fp.losses.cross_entropy)
        >>> batch = torch.rand(8, 4), torch.zeros(8, dtype=torch.int64)
        >>> fp.ntk(problem, problem.params, batch, kind="sum").shape
        torch.Size([8, 8])
    """
    if kind not in ("full", "sum"):
        msg = f"kind must be 'full' or 'sum', not {kind!r}"
        raise ValueError(msg)
    left = _jacobian(problem, params, batch, generator)
    right = left if other is None else _jacobian(problem, params, other, generator)
    entries = left[1]
    if kind == "sum":
        each = ((_entry(*left, v), _entry(*right, v)) for v in range(entries))
        return torch.stack([_inner(a, b) for a, b in each]).sum(0)
    kernel = _inner(left[0], right[0])
    return rearrange(kernel, "(o n) (q m) -> n o m q", o=entries, q=entries)


@dataclasses.dataclass(frozen=True, eq=False)
class _Outputs(Loss):
    """The sum of the outputs, in the place of a loss, which the kernel does not need."""

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        if not isinstance(outputs, Tensor):
            msg = (
                "ntk() needs a model with one tensor as its output, not a "
                f"{type(outputs).__name__}: wrap the model so that it returns one tensor"
            )
            raise TypeError(msg)
        return outputs.sum()

    def constant(self, outputs: Tensor, targets: Any) -> Tensor:
        return outputs.new_ones(())


@dataclasses.dataclass(frozen=True)
class _JacobianRows(ExampleRows):
    """The rows of J: in turn, those of one entry of every example's output."""

    def cotangents(self, evaluation: Evaluation, noise: Any) -> list[Tensor]:
        (place,) = evaluation.examples.outputs
        parts = place.split(torch.zeros_like(evaluation.outputs))
        chosen = torch.eye(parts[0].numel(), dtype=parts.dtype, device=parts.device)
        return [place.join(row.reshape(parts[0].shape).expand(parts.shape)) for row in chosen]


def _jacobian(problem, params, batch, generator) -> tuple[Gram, int]:
    """The Jacobian as layers' inputs and output gradients, with rows ordered as (o, n); and O."""
    problem = dataclasses.replace(problem, loss=_Outputs())
    run = Evaluation(problem, params, batch, generator=generator, layers=True)
    rows = Gram.from_layers(_JacobianRows("exact").measure(run, ()), params)
    return rows, run.outputs.numel() // run.examples.count


def _entry(gram: Gram, entries: int, v: int) -> Gram:
    """The rows of the Jacobian that belong to the v-th of the output's entries."""
    layers = tuple(dataclasses.replace(x, grads=x.grads[:, v : v + 1]) for x in gram.layers)
    others = {k: x.unflatten(0, (entries, -1))[v] for k, x in gram.others.items()}
    return dataclasses.replace(gram, layers=layers, others=others)


def _inner(a: Gram, b: Gram) -> Tensor:
    """The inner products of the rows of two Jacobians."""
    left, right = ({x.weight: x for x in gram.layers} for gram in (a, b))
    shared = left.keys() & right.keys()
    terms = [left[k].gram(right[k]) for k in shared]
    # The rows are formed for a parameter that is in a layer on one of the two batches only.
    rows = [
        gram.others
        | {k: x for p in gram.layers if p.weight not in shared for k, x in p.rows().items()}
        for gram in (a, b)
    ]
    ours, theirs = ({k: x.reshape(len(x), -1) for k, x in each.items()} for each in rows)
    terms += [x @ theirs[k].mT for k, x in ours.items()]
    return torch.stack(terms).sum(0)
