"""Per-example gradients, and the empirical Fisher matrix that they are rows of.

An example's gradient in an affine layer is ``sum_t g_nt a_nt^T``, of the layer's inputs and output
gradients: one product for all examples. What no layer covers is differentiated by ``vmap``.
"""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.autodiff.examples import refuse_coupling
from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.layers.blocks import Layers, split_block
from funcprecond.layers.layer_call import LayerUse
from funcprecond.linalg.precision import factor_dtype
from funcprecond.need import Need
from funcprecond.problems import Problem
from funcprecond.tree import Params, state

__all__ = ["PerSample", "PerSampleGrads", "per_sample_grads"]


@state
class PerSample:
    """Gradients of the single examples' losses.

    Attributes:
        grads: (N, *shape) for each parameter: the gradient of the sum of the example's terms.
        scale: ``c``, by which their sum is multiplied to give the loss's gradient, a 0-d tensor.
    """

    grads: Params
    scale: Tensor

    def diagonal(self) -> Params:
        """The diagonal of the empirical Fisher matrix ``c sum_n g_n g_n^T``."""
        # In float32 or wider: the squares of half-precision gradients vanish.
        return {
            k: self.scale * torch.linalg.vector_norm(g, dim=0, dtype=factor_dtype(g)).square()
            for k, g in self.grads.items()
        }


@dataclasses.dataclass(frozen=True)
class PerSampleGrads(Need):
    """The gradient of each example.

    Attributes:
        chunk_size: examples at a time, or None for all at once. The result, N times the parameters,
            is in memory either way.
    """

    chunk_size: int | None = None
    layers: ClassVar[bool] = True
    gives: ClassVar[type] = PerSample

    def measure(self, evaluation: Evaluation, noise: Any) -> PerSample:
        layers = _LAYERS.measure(evaluation, ())
        # Their output gradients are the loss's, c times those of the examples' terms.
        return PerSample(self.rows(evaluation, layers, layers.scale), evaluation.constant)

    def rows(self, evaluation: Evaluation, layers: Layers, factor: Tensor | None = None) -> Params:
        """The examples' gradients, of the layers' output gradients times ``factor``."""
        refuse_coupling(evaluation.problem)
        params, count = evaluation.params, evaluation.count
        step = self.chunk_size or max(count, 1)
        parts = [
            _of_layers(_part(layers, slice(i, i + step), factor), params)
            for i in range(0, count, step)
        ]
        found = parts[0]
        if len(parts) > 1:
            # Popped, so that only the parts that are still to be joined are kept.
            found = {k: torch.cat([p.pop(k) for p in parts]) for k in [*found]}
        rest = [k for k in params if k not in found]
        if rest:
            (own,) = evaluation.cotangents("empirical", ())
            found |= evaluation.pull_each(own, rest, self.chunk_size)
        return {k: found[k].to(p.dtype) for k, p in params.items()}


_LAYERS = LayerStatistics("empirical", others="none", per_sample=True)


def _part(layers: Layers, examples: slice, factor: Tensor | None) -> Layers:
    def part(use: LayerUse) -> LayerUse:
        g = use.grads[:, examples]
        g = g if factor is None else g * factor.to(g.dtype)
        return dataclasses.replace(use, inputs=use.inputs[examples], grads=g)

    uses = {block: tuple(map(part, of_block)) for block, of_block in layers.uses.items()}
    return dataclasses.replace(layers, uses=uses)


def _of_layers(layers: Layers, params: Params) -> Params:
    """(N, *shape) for each parameter that is in a layer."""
    found: Params = {}
    names = [split_block(block) for block in layers.uses]
    weights = {weight: params[weight] for weight, _ in names}
    biases = {bias: params[bias] for _, bias in names if bias}
    # Biases by themselves: as a last column of the weights they would be moved about with these.
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
    """The gradient of each example's loss: (N, *shape) for each parameter.

    Their sum, times the loss's reduction constant (1 / N for a mean over examples), is the
    gradient. Costs a gradient, and writing the result.

    Raises:
        ValueError: the model couples the examples of a batch (BatchNorm in training mode).
    """
    evaluation = Evaluation(problem, params, batch, generator=generator, layers=True)
    (layers,) = _LAYERS.each(evaluation, ())
    return PerSampleGrads(chunk_size).rows(evaluation, layers)
