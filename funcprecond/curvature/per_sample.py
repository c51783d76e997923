"""Per-sample gradients, which are the rows of the empirical Fisher matrix.

In an affine layer, an example's gradient is ``sum_t g_nt a_nt^T`` over its positions t, from the
layer's inputs a and output gradients g. One batched product gives the gradients of all examples.
Parameters that no layer covers are differentiated by ``vmap``.
"""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.curvature.layer_statistics import ExampleRows
from funcprecond.layers.blocks import Layers, split_block
from funcprecond.layers.layer_call import LayerUse
from funcprecond.linalg.precision import factor_dtype
from funcprecond.need import Need
from funcprecond.problems import Problem
from funcprecond.tree import Params, state

__all__ = ["PerSample", "PerSampleGrads", "per_sample_grads"]


@state
class PerSample:
    """The gradients of the losses of single examples.

    Attributes:
        grads: (N, *shape) for each parameter: for each example, the gradient of the sum of its loss
            terms.
        scale: the reduction constant c of the loss, a 0-d tensor. The gradient of the loss is c
            times the sum of these gradients.
    """

    grads: Params
    scale: Tensor

    def diagonal(self) -> Params:
        """The diagonal of the empirical Fisher matrix ``c sum_n g_n g_n^T``."""
        # The sum is in float32 or wider, because squares of half-precision gradients underflow.
        return {
            k: self.scale * torch.linalg.vector_norm(g, dim=0, dtype=factor_dtype(g)).square()
            for k, g in self.grads.items()
        }


@dataclasses.dataclass(frozen=True)
class PerSampleGrads(Need):
    """The gradient of each example's loss.

    The measured value is a :class:`PerSample`.

    Attributes:
        chunk_size: the number of examples that are processed at a time, or None for all at once.
            The result, which is N times as large as the parameters, is in memory either way.
    """

    chunk_size: int | None = None
    layers: ClassVar[bool] = True
    gives: ClassVar[type] = PerSample

    def measure(self, evaluation: Evaluation, noise: Any) -> PerSample:
        layers = _LAYERS.measure(evaluation, ())
        # The output gradients belong to the loss: they are c times those of the loss terms. The
        # scale of the layers, 1 / c, corrects this.
        return PerSample(self.rows(evaluation, layers, layers.scale), evaluation.constant)

    def rows(self, evaluation: Evaluation, layers: Layers, factor: Tensor | None = None) -> Params:
        """The per-sample gradients, with the output gradients of the layers times ``factor``.

        Args:
            evaluation: the batch, opened with ``layers=True``.
            layers: the statistics of its layers.
            factor: a 0-d tensor, or None for 1.

        Returns:
            (N, *shape) for each parameter.
        """
        params, count = evaluation.params, evaluation.count
        step = self.chunk_size or max(count, 1)
        parts = [
            _of_layers(_part(layers, slice(i, i + step), factor), params)
            for i in range(0, count, step)
        ]
        found = parts[0]
        if len(parts) > 1:
            # ``pop`` frees each part of a gradient once it is joined.
            found = {k: torch.cat([p.pop(k) for p in parts]) for k in [*found]}
        rest = [k for k in params if k not in found]
        if rest:
            (own,) = evaluation.cotangents("empirical", ())
            found |= evaluation.pull_each(own, rest, self.chunk_size)
        return {k: found[k].to(p.dtype) for k, p in params.items()}


_LAYERS = ExampleRows("empirical", others="none")


def _part(layers: Layers, examples: slice, factor: Tensor | None) -> Layers:
    def part(use: LayerUse) -> LayerUse:
        # Positions may be merged with the examples.
        inner = use.call.inner
        own = slice(examples.start * inner, examples.stop * inner)
        g = use.grads[:, own]
        g = g if factor is None else (g * factor).to(g.dtype)
        return dataclasses.replace(use, inputs=use.inputs[own], grads=g)

    uses = {block: tuple(map(part, of_block)) for block, of_block in layers.uses.items()}
    return dataclasses.replace(layers, uses=uses)


def _of_layers(layers: Layers, params: Params) -> Params:
    """The per-sample gradients, (N, *shape), of each parameter that a layer covers."""
    found: Params = {}
    names = [split_block(block) for block in layers.uses]
    weights = {weight: params[weight] for weight, _ in names}
    biases = {bias: params[bias] for _, bias in names if bias}
    # Biases are formed separately; as a last column of the weights they would have to be copied.
    for own in (weights, biases):
        kept, formed = layers.example_gradients(own)
        for rows in kept:
            found |= rows.rows()
        found |= formed
    return found


def per_sample_grads(
    problem: Problem,
    params: Params,
    batch: Any,
    *,
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Params:
    """The gradient of each example's loss.

    Their sum, times the reduction constant of the loss (``1 / N`` for a mean over examples), is the
    gradient of the loss.

    Args:
        problem, params, batch: the problem, and the point and the batch to evaluate.
        chunk_size: the number of examples that are processed at a time; None means all at once.
        generator: the source of randomness for the model's dropout masks.

    Returns:
        (N, *shape) for each parameter. Costs one gradient, and the time to write the result.

    Raises:
        ValueError: the model couples the examples of a batch (BatchNorm in training mode), random
            numbers are needed and there is no generator, or the batch is empty.
        RuntimeError: ``vmap`` cannot run the model, which has parameters that no layer covers.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(4, 3), fp.losses.cross_entropy)
        >>> batch = torch.ones(8, 4), torch.arange(8) % 3
        >>> fp.per_sample_grads(problem, problem.params, batch)["weight"].shape
        torch.Size([8, 3, 4])
    """
    evaluation = Evaluation(problem, params, batch, generator=generator, layers=True)
    (layers,) = _LAYERS.each(evaluation, ())
    return PerSampleGrads(chunk_size).rows(evaluation, layers)
