r"""Products with a Fisher matrix from its rows, layer by layer, without running the model.

The call of a layer computes :math:`z_n = \mathrm{call}(a_n; \theta)` from its input :math:`a_n`,
and it is linear in its parameters. The row :math:`r_n` is the pull-back of the cotangent of example
n to the parameters, and :math:`g_n` is its pull-back to the output of a call. The inner product of
a row with a vector v is then
:math:`r_n \cdot v = \sum_\mathrm{calls} g_n \cdot \mathrm{call}(a_n; v)`, and a weighted sum
:math:`\sum_n s_n r_n` is :math:`s_n g_n` pulled back through the same calls. These are two products
with the inputs of each layer, where ``J v`` and ``J^T u`` through the model take up to four
products, and nothing is differentiated twice.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.autodiff.linear_map import linear_map
from funcprecond.layers.layer_call import LayerCall
from funcprecond.layers.place import Place
from funcprecond.linalg.precision import wide
from funcprecond.tracing import is_eager
from funcprecond.tree import Params

__all__ = ["FisherRows", "rows_of"]


@dataclasses.dataclass(frozen=True, eq=False)
class FisherRows:
    """The matrix ``c Σ_vn r_vn r_vn^T`` of V cotangents and N examples, from the calls of one run.

    Attributes:
        calls, inputs: the recorded calls of layers, and the input of each.
        grads: for each cotangent, its pull-backs to the output of each call, (N, ...).
        scale: the factor c, a 0-d tensor.
        places: where the examples are in the output of each call.
    """

    calls: Sequence[LayerCall]
    inputs: Sequence[Tensor]
    grads: Sequence[Sequence[Tensor]]
    scale: Tensor
    places: Sequence[Place]

    def product(self, vector: Params) -> Params:
        """Multiply the matrix by a vector.

        Args:
            vector: shaped like the parameters.

        Returns:
            Shaped like the parameters. Costs 0.5 to 0.9 gradients per cotangent.
        """

        def product(given):
            return [*self._product(dict(zip(vector, given, strict=True))).values()]

        found = linear_map(product, product, [*vector.values()])
        return dict(zip(vector, found, strict=True))

    def _product(self, vector: Params) -> Params:
        leaves = {k: v.detach().requires_grad_() for k, v in vector.items()}
        edges, dtypes = [], []

        def steps() -> Iterator[Tensor]:
            # Only the edge of each step in the graph is kept. Its value is used in inner products.
            for call, x in zip(self.calls, self.inputs, strict=True):
                with torch.enable_grad():
                    step = call.apply(leaves, _like_parameters(call, x, vector))
                edges.append(get_gradient_edge(step))
                dtypes.append(step.dtype)
                yield step.detach()

        inner = [self.scale * s for s in self._inner_products(steps())]
        found: Params = {}
        for i, (call, edge) in enumerate(zip(self.calls, edges, strict=True)):
            place = self.places[i]
            pulled = [place.spread(s, g[i]) for s, g in zip(inner, self.grads, strict=True)]
            total = functools.reduce(torch.add, pulled).to(dtypes[i])
            names = [k for k in (call.weight, call.bias) if k is not None]
            parts = torch.autograd.grad(edge, [leaves[k] for k in names], total)
            for k, part in zip(names, parts, strict=True):
                found[k] = found[k] + part if k in found else part
        return {k: found[k] if k in found else torch.zeros_like(v) for k, v in vector.items()}

    def form(self, vector: Params) -> Tensor:
        """Compute the quadratic form ``v · F v``, where F is this matrix.

        Args:
            vector: v, shaped like the parameters.

        Returns:
            A 0-d tensor, in the dtype of :func:`funcprecond.linalg.precision.wide`. Costs half of
            :meth:`product`.
        """
        pairs = zip(self.calls, self.inputs, strict=True)
        inner = self._inner_products(
            call.apply(vector, _like_parameters(call, x, vector)) for call, x in pairs
        )
        return self.scale * sum(wide(s).square().sum() for s in inner)

    def _inner_products(self, steps: Iterable[Tensor]) -> Sequence[Tensor]:
        """Compute the (N,) inner products of a vector with the rows of each cotangent.

        Args:
            steps: the outputs of the calls with the vector in place of the parameters.
        """
        inner = [self.scale.new_zeros(())] * len(self.grads)
        for i, step in enumerate(steps):
            place = self.places[i]
            inner = [
                s + place.sum_others(step * g[i]) for s, g in zip(inner, self.grads, strict=True)
            ]
        return inner


def _like_parameters(call: LayerCall, x: Tensor, params: Params) -> Tensor:
    """The input of a call in the dtype of its parameters, from which autocast may have cast it."""
    names = (k for k in (call.weight, call.bias) if k is not None)
    dtype = params[next(names)].dtype
    return x.to(dtype) if x.is_floating_point() and x.dtype != dtype else x


def rows_of(
    evaluation: Evaluation, cotangents: Sequence[Any], scale: Tensor, keep: bool
) -> FisherRows | None:
    """Compute the rows of some cotangents, with one pull-back to the layers for each.

    Args:
        evaluation: an evaluation that was made with ``layers=True``.
        cotangents: the cotangents, each shaped like the outputs, without the factor c.
        scale: the factor c.
        keep: whether the evaluation is used afterwards. If not, the last pull-back frees its graph.

    Returns:
        The rows, or None if the recorded layers do not determine them: under a transform, if a
        parameter has a use that is not recorded, or if the outputs of an example depend on other
        examples.
    """
    if not is_eager((evaluation.params, evaluation.inputs, cotangents)):
        return None
    calls = evaluation.calls
    if not calls or evaluation.unrecorded:
        return None
    places = evaluation.examples.calls
    if evaluation.examples.coupling or None in places:
        return None
    for cotangent in cotangents:
        evaluation.examples.check_cotangent(cotangent)
    last = len(cotangents) - 1
    grads = [evaluation.pull_layers(u, keep or i < last) for i, u in enumerate(cotangents)]
    return FisherRows(calls, evaluation.layer_inputs, grads, scale, places)
