"""The two ways a run is differentiated, an autograd graph and ``torch.func.vjp``, and a run alone.

:class:`funcprecond.Evaluation` chooses one; the first two answer the same questions with the same
numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.func import grad, vjp

from funcprecond import tree
from funcprecond.autodiff.recorder import Call
from funcprecond.autodiff.rules.layer_norm import Spared
from funcprecond.autodiff.symbolic_zeros import Unevaluated
from funcprecond.problems import Params, detach, example_count

__all__ = ["ForwardRun", "FunctionRun", "GraphRun", "opened_once", "renamed"]


def opened_once(method: Callable) -> property:
    """A property computed at its first use; functools' has a lock, which compilers cannot trace."""
    name = f"_{method.__name__}_value"

    def get(self):
        if name not in self.__dict__:
            setattr(self, name, method(self))
        return getattr(self, name)

    def forget(self):
        self.__dict__.pop(name, None)

    return property(get, fdel=forget, doc=method.__doc__)


class GraphRun:
    """The run as an autograd graph on leaves of its own.

    It does not refer back to its evaluation: the graph is freed when the last user lets go, not
    when a garbage collector comes by.
    """

    def __init__(self, evaluation: Any, params: Params | None = None):
        self._twice, self._keep = evaluation._twice, evaluation._keep
        if torch.is_inference_mode_enabled():
            msg = (
                "nothing can be differentiated under torch.inference_mode: use torch.no_grad there"
            )
            raise RuntimeError(msg)
        taps = evaluation._taps and params is None
        source = evaluation.params if params is None else params
        # New leaves, so that no flag and no .grad of the caller's tensors is touched.
        self.leaves = {k: p.detach().requires_grad_() for k, p in source.items()}
        if self._twice:
            # Of these torch tells in a backward pass whether it is to reach them.
            with torch.enable_grad():
                self.leaves = renamed(self.leaves)
        self.edges = []
        self._spared, self._graph_of_grads = Spared(self.leaves.values()), None

        def tap(output):
            self.edges.append(get_gradient_edge(output))
            return output

        with torch.enable_grad():
            self.outputs, buffers, capture = evaluation._forward(
                self.leaves, tap if taps else None, self._spared
            )
            example_count(self.outputs)
            self.loss = evaluation.problem.loss(self.outputs, evaluation.targets)
        self.buffers = {k: b.detach() for k, b in buffers.items()}
        self.calls, self.unrecorded = capture.calls, capture.unrecorded
        self.layer_inputs = [x.detach() for x in capture.inputs]

    @opened_once
    def grads(self):
        inputs = [*self.leaves.values(), *self.edges]
        graph = self._twice and self._graph_of_grads is None
        everything = self._gradient(self.loss, None, inputs, graph, self._keep)
        n = len(self.leaves)
        grads = dict(zip(self.leaves, everything[:n], strict=True))
        if not graph:
            return grads, everything[n:]
        self._graph_of_grads = grads
        return detach(grads), [g.detach() for g in everything[n:]]

    def pull(self, cotangents, keep):
        pulled = self._pull(cotangents, [*self.leaves.values()], keep=keep)
        return dict(zip(self.leaves, pulled, strict=True))

    def pull_layers(self, cotangents, keep):
        return self._pull(cotangents, self.edges, keep=keep)

    def hvp(self, evaluation, vector, keep):
        if not self._twice:
            msg = "products with the Hessian need twice=True, in the Evaluation or in the Need"
            raise RuntimeError(msg)
        if self._graph_of_grads is None:
            # Its value is of no use here, if nobody has asked for it.
            with self._spared.switched_on():
                grads = self._gradient(self.loss, None, [*self.leaves.values()], create_graph=True)
            self._graph_of_grads = dict(zip(self.leaves, grads, strict=True))
        return self._through(self._graph_of_grads, vector, self.leaves, keep)

    def jvp(self, evaluation, vector, keep):
        seed, pulled = self._transposed
        if not keep:
            del self._transposed
        flat, spec = tree.flatten(self.outputs)
        result = self._through(pulled, vector, dict(enumerate(seed)), keep)
        return tree.unflatten([result[i] for i in range(len(flat))], spec)

    @opened_once
    def _transposed(self):
        """``u -> J^T u`` as a graph in ``u``, without values: its own pull-back is ``J``."""
        unevaluated = Unevaluated()
        seed = [unevaluated.zeros(x).requires_grad_() for x in tree.leaves(self.outputs)]
        with unevaluated:
            pulled = self._pull(seed, [*self.leaves.values()], create_graph=True)
        return seed, dict(zip(self.leaves, pulled, strict=True))

    def _through(self, graph, vector, inputs, keep=True):
        """The vector pulled back through a graph of gradients to its inputs."""
        alive = [k for k, g in graph.items() if g.requires_grad]
        if not alive:
            return {k: torch.zeros_like(x) for k, x in inputs.items()}
        values = self._gradient(
            [graph[k] for k in alive],
            [vector[k] for k in alive],
            [*inputs.values()],
            keep=keep,
        )
        return dict(zip(inputs, values, strict=True))

    def _pull(self, cotangents, inputs, create_graph=False, keep=True):
        pairs = [
            (x, u)
            for x, u in zip(tree.leaves(self.outputs), tree.leaves(cotangents), strict=True)
            if x.requires_grad
        ]
        outputs = [x for x, _ in pairs]
        return self._gradient(outputs, [u for _, u in pairs], inputs, create_graph, keep)

    def _gradient(self, outputs, cotangents, inputs, create_graph=False, keep=True):
        flat = [outputs] if isinstance(outputs, Tensor) else outputs
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if inputs and any(x.requires_grad for x in flat):
            options = {"retain_graph": keep, "create_graph": create_graph, "allow_unused": True}
            try:
                found = torch.autograd.grad(outputs, inputs, cotangents, **options)
            except RuntimeError as error:
                if "backward through the graph a second time" not in str(error):
                    raise
                msg = (
                    "the graph of this run was freed by a call with keep=False, which has to be "
                    "the last one: open the batch again, or keep it"
                )
                raise RuntimeError(msg) from error
        return [self._zero(x) if g is None else g for g, x in zip(found, inputs, strict=True)]

    def _zero(self, unreached):
        """The gradient with respect to what the outputs do not depend on."""
        if isinstance(unreached, Tensor):
            return torch.zeros_like(unreached)
        like = next(iter(self.leaves.values()))
        return like.new_zeros(self.calls[self.edges.index(unreached)].shape)


class FunctionRun:
    """The run built from ``torch.func.vjp``, for use inside other transforms."""

    def __init__(self, evaluation: Any):
        self._hessian = self._jacobian = None
        self.calls: list[Call] = []
        self.unrecorded: dict[str, str] = {}
        if evaluation._taps:
            # Only the shapes of the layers' outputs are used; a compiler removes this run.
            with torch.no_grad():
                _, _, capture = evaluation._forward(renamed(evaluation.params), lambda z: z)
            self.calls, self.unrecorded = capture.calls, capture.unrecorded
        like = next(iter(tree.leaves(evaluation.params)), torch.zeros(()))
        self._zeros = [like.new_zeros(()).expand(c.shape) for c in self.calls]
        calls = len(self.calls)

        def f(params, zeros):
            rest = iter(zeros)
            tap = (lambda z: z + next(rest)) if evaluation._taps else None
            outputs, buffers, capture = evaluation._forward(renamed(params), tap)
            if len(capture.calls) != calls:
                # Without this check a call missed here would have a gradient of zero, silently.
                msg = (
                    f"{calls} layer calls were seen in one run and {len(capture.calls)} in another"
                )
                raise RuntimeError(msg)
            return outputs, (buffers, capture.inputs)

        self.outputs, self._vjp, (self.buffers, self.layer_inputs) = vjp(  # pyright: ignore
            f, evaluation.params, self._zeros, has_aux=True
        )
        example_count(self.outputs)
        self.loss, self._loss_vjp = vjp(  # pyright: ignore
            lambda x: evaluation.problem.loss(x, evaluation.targets), self.outputs
        )

    @opened_once
    def grads(self):
        return self._vjp(self._loss_vjp(torch.ones_like(self.loss))[0])

    def pull(self, cotangents, keep):
        return self._vjp(cotangents)[0]

    def pull_layers(self, cotangents, keep):
        return self._vjp(cotangents)[1]

    def hvp(self, evaluation, vector, keep):
        if self._hessian is None:
            self._hessian = vjp(grad(lambda p: evaluation._loss(p)[0]), evaluation.params)[1]
        return self._hessian(vector)[0]

    def jvp(self, evaluation, vector, keep):
        if self._jacobian is None:
            # A pull-back of its own: the one with zeros would be transposed together with them.
            pull = vjp(lambda p: evaluation._forward(p, None)[0], evaluation.params)[1]
            zeros = tree.map(torch.zeros_like, self.outputs)
            self._jacobian = vjp(lambda u: pull(u)[0], zeros)[1]
        return self._jacobian(vector)[0]


class ForwardRun:
    """The run alone: its outputs, and what the layers were given."""

    def __init__(self, evaluation: Any):
        params = renamed(evaluation.params)
        self.outputs, self.buffers, capture = evaluation._forward(params, lambda z: z)
        self.calls, self.unrecorded = capture.calls, capture.unrecorded
        self.layer_inputs = capture.inputs


def renamed(params: Params) -> Params:
    """The same values as tensors made here, whose identities a compiler does not guard on."""
    return {k: p.view_as(p) for k, p in params.items()}
