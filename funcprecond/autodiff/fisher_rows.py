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
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from funcprecond import tree
from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.autodiff.recorder import CONVS, TRANSPOSED_CONVS, Call, Capture
from funcprecond.autodiff.runs import renamed
from funcprecond.linalg.precision import wide
from funcprecond.problems import Params
from funcprecond.tracing import untransformed

__all__ = ["Rows", "rows_of"]


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """The matrix ``c Σ_vn r_vn r_vn^T`` of V cotangents, by the calls of one run.

    Attributes:
        calls, inputs: the calls and what each was given.
        grads: for each cotangent, those pulled back to every call's output, (N, ...).
        scale: c, a 0-d tensor.
    """

    calls: Sequence[Call]
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
                    step = _call_with(leaves, call, x)
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
        inner = self._inner_products(_call_with(vector, call, x) for call, x in pairs)
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
) -> Rows | None:
    """The rows of these cotangents, opened by one pull-back to the layers for each.

    Args:
        evaluation: made with ``taps``.
        cotangents: each shaped like the outputs, without ``c``.
        scale: c.
        keep: whether anything is asked of the evaluation afterwards; if not, its graph is freed by
            the last pull-back.

    Returns:
        None where the layers do not tell of everything: under a transform, or where a parameter
        has a use that is not recorded, or where an example's outputs depend on another example.
    """
    if not untransformed((evaluation.params, evaluation.inputs, cotangents)):
        return None
    calls = evaluation.calls
    if not calls or evaluation.unrecorded or not _examples_are_apart(evaluation):
        return None
    last = len(cotangents) - 1
    grads = [evaluation.pull_layers(u, keep or i < last) for i, u in enumerate(cotangents)]
    return Rows(calls, evaluation.layer_inputs, grads, scale)


def _call_with(params: Params, call: Call, x: Tensor) -> Tensor:
    """What a call adds to the run where its parameters are these."""
    weight = params[call.weight]
    bias = None if call.bias is None else params[call.bias]
    if call.kind == "linear":
        return F.linear(x, weight if call.options == ("out_in",) else weight.mT, bias)
    if call.kind == "conv":
        dims, *options = call.options
        (convolve,) = (f for f, n in CONVS.items() if n == dims)
        return convolve(x, weight, bias, *options)
    if call.kind == "conv_transpose":
        dims, stride, padding, dilation, groups, added = call.options
        (convolve,) = (f for f, n in TRANSPOSED_CONVS.items() if n == dims)
        return convolve(x, weight, None, stride, padding, added, groups, dilation)
    if call.kind == "embedding":
        padding = call.options[0]
        found = F.embedding(x, weight)
        # A padding row gets no gradient.
        return found if padding is None else found * (x != padding % len(weight)).unsqueeze(-1)
    if call.kind == "norm":
        if call.options[0] == "channel":
            shape = (-1, *[1] * (x.ndim - 2))
            weight, bias = weight.reshape(shape), None if bias is None else bias.reshape(shape)
        return x * weight if bias is None else x * weight + bias
    return weight.expand(call.shape)


def _examples_are_apart(evaluation: Evaluation) -> bool:
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


def _are_alike(evaluation: Evaluation, shapes: Sequence[tuple[int, ...]], part: slice) -> bool:
    """Whether the calls and outputs of these examples alone are those among all."""
    count = evaluation.count
    inputs = tree.map(
        lambda x: x[part] if isinstance(x, Tensor) and x.ndim and x.shape[0] == count else x,
        evaluation.inputs,
    )
    params = renamed(evaluation.params)
    capture = Capture(params, lambda z: z, tuple(m[part] for m in evaluation.masks))
    try:
        with torch.no_grad(), capture:
            alone, _ = evaluation.problem.forward(params, evaluation._buffers, inputs)
    except Exception:
        # A model that cannot run on so few examples, for whatever reason, cannot be asked.
        return False
    size = len(range(count)[part])
    return [call.shape for call in capture.calls] == [(size, *s[1:]) for s in shapes] and all(
        torch.allclose(x, y[part], rtol=0, atol=float(_rounding(y)), equal_nan=True)
        for x, y in zip(tree.leaves(alone), tree.leaves(evaluation.outputs), strict=True)
    )


def _rounding(x: Tensor) -> Tensor:
    """What the outputs of a batch and of a part of it may differ by."""
    return torch.finfo(x.dtype).eps ** 0.5 * x.abs().nan_to_num().amax()
