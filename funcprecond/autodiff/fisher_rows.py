r"""Products with a Fisher matrix from its rows, layer by layer, without running the model.

A call adds :math:`z_n = \mathrm{call}(a_n; \theta)` to the run, linear in its own parameters. So
the row that cotangents are pulled back to, example by example, has the inner product
:math:`r_n \cdot v = \sum_\mathrm{calls} g_n \cdot \mathrm{call}(a_n; v)` with a vector, g being
the cotangents pulled back to the call's output; and :math:`\sum_n s_n r_n` is :math:`s_n g_n`
pulled back through the same calls. These are two products with each layer's inputs, where ``J v``
and ``J^T u`` through the model take up to four, and nothing is differentiated twice.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from funcprecond.autodiff import examples
from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.layers.layer_call import LayerCall
from funcprecond.linalg.precision import wide
from funcprecond.tracing import is_eager
from funcprecond.tree import Params

__all__ = ["FisherRows", "rows_of"]


@dataclasses.dataclass(frozen=True, eq=False)
class FisherRows:
    """The matrix ``c Σ_vn r_vn r_vn^T`` of V cotangents, by the calls of one run.

    Attributes:
        calls, inputs: the calls and what each was given.
        grads: for each cotangent, those pulled back to every call's output, (N, ...).
        scale: c, a 0-d tensor.
    """

    calls: Sequence[LayerCall]
    inputs: Sequence[Tensor]
    grads: Sequence[Sequence[Tensor]]
    scale: Tensor

    def product(self, vector: Params) -> Params:
        """The matrix times a vector: 0.5 to 0.9 gradients for each cotangent."""
        leaves = {k: v.detach().requires_grad_() for k, v in vector.items()}
        edges = []

        def steps() -> Iterator[Tensor]:
            # Only the place of each in the graph is kept: its value goes into inner products.
            for call, x in zip(self.calls, self.inputs, strict=True):
                with torch.enable_grad():
                    step = call.apply(leaves, x)
                edges.append(get_gradient_edge(step))
                yield step.detach()

        inner = [self.scale * s for s in self._inner_products(steps())]
        found: Params = {}
        for i, (call, edge) in enumerate(zip(self.calls, edges, strict=True)):
            pulled = [
                g[i] * s.reshape(-1, *[1] * (g[i].ndim - 1)).to(g[i].dtype)
                for s, g in zip(inner, self.grads, strict=True)
            ]
            total = functools.reduce(torch.add, pulled)
            names = [k for k in (call.weight, call.bias) if k is not None]
            parts = torch.autograd.grad(edge, [leaves[k] for k in names], total)
            for k, part in zip(names, parts, strict=True):
                found[k] = found[k] + part if k in found else part
        return {k: found[k] if k in found else torch.zeros_like(v) for k, v in vector.items()}

    def form(self, vector: Params) -> Tensor:
        """``v · F v``, a 0-d tensor, :func:`wide`: half a product."""
        pairs = zip(self.calls, self.inputs, strict=True)
        inner = self._inner_products(call.apply(vector, x) for call, x in pairs)
        return self.scale * sum(wide(s).square().sum() for s in inner)

    def _inner_products(self, steps: Iterable[Tensor]) -> Sequence[Tensor]:
        """(N,) inner products of each cotangent's rows with a vector, of what its calls add."""
        inner = [self.scale.new_zeros(())] * len(self.grads)
        for i, step in enumerate(steps):
            inner = [
                s + (step * g[i]).flatten(1).sum(1) for s, g in zip(inner, self.grads, strict=True)
            ]
        return inner


def rows_of(
    evaluation: Evaluation, cotangents: Sequence[Any], scale: Tensor, keep: bool
) -> FisherRows | None:
    """The rows of these cotangents, opened by one pull-back to the layers for each.

    Args:
        evaluation: made with ``layers``.
        cotangents: each shaped like the outputs, without ``c``.
        scale: c.
        keep: whether anything is asked of the evaluation afterwards; if not, its graph is freed by
            the last pull-back.

    Returns:
        None where the layers do not tell of everything: under a transform, or where a parameter
        has a use that is not recorded, or where an example's outputs depend on another example.
    """
    if not is_eager((evaluation.params, evaluation.inputs, cotangents)):
        return None
    calls = evaluation.calls
    if not calls or evaluation.unrecorded or not examples.are_apart(evaluation):
        return None
    last = len(cotangents) - 1
    grads = [evaluation.pull_layers(u, keep or i < last) for i, u in enumerate(cotangents)]
    return FisherRows(calls, evaluation.layer_inputs, grads, scale)
