"""Forward runs that are differentiated as ordinary autograd graphs, where nothing traces them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from funcprecond import tree
from funcprecond.autodiff.graph_check import Unchanged, check_graph, check_recording
from funcprecond.autodiff.hidden_uses import passes_by
from funcprecond.autodiff.linear_map import linear_map
from funcprecond.autodiff.once import opened_once, renamed
from funcprecond.autodiff.rules.backward import Spared
from funcprecond.autodiff.symbolic_zeros import SymbolicZeros
from funcprecond.problems import check_outputs, detach
from funcprecond.tracing import is_differentiated
from funcprecond.tree import Params

__all__ = ["GraphRun"]


class GraphRun:
    """A forward run as an autograd graph whose leaves are copies of the parameters.

    Its methods implement those of :class:`funcprecond.autodiff.evaluation.Evaluation`. It has no
    reference to its evaluation, so the graph is freed with the last reference to it and does not
    wait for the garbage collector.
    """

    def __init__(self, evaluation: Any, params: Params | None = None):
        self._twice, self._keep = evaluation._twice, evaluation._keep
        self._takes_gradient = evaluation._takes_gradient
        check_recording()
        records_layers = evaluation._layers and params is None
        source = evaluation.params if params is None else params
        # New leaves, so that no flag and no .grad of the caller's tensors changes.
        self.leaves = {k: p.detach().requires_grad_() for k, p in source.items()}
        own, is_closed = {id(p) for p in self.leaves.values()}, torch.is_grad_enabled()
        if self._twice:
            # Views, because torch can tell whether a backward pass reaches a view, but not whether
            # it reaches a leaf.
            with torch.enable_grad():
                self.leaves = renamed(self.leaves)
        self.edges = []
        self._spared, self._graph_of_grads = Spared(self.leaves.values()), None

        def tap(output):
            self.edges.append(get_gradient_edge(output))
            return output

        watched = Unchanged(source, evaluation.leaves)
        with torch.enable_grad():
            self.outputs, buffers, recorder = evaluation._forward(
                self.leaves,
                tap if records_layers else None,
                spared=self._spared,
                in_graph=records_layers,
            )
            check_outputs(self.outputs)
            self.loss = evaluation.problem.loss(self.outputs, evaluation.targets)
        watched.check()
        own |= {id(x) for x in recorder.own_leaves}
        self._check(evaluation, own, is_closed)
        self.buffers = {k: b.detach() for k, b in buffers.items()}
        self.calls, self.unrecorded = recorder.calls, recorder.unrecorded
        if records_layers:
            found = recorder.hidden_uses(tree.floating(self.outputs))
            self.unrecorded = found | self.unrecorded
        self.layer_inputs = [x.detach() for x in recorder.inputs]

    def _check(self, evaluation: Any, own: set[int], is_closed: bool) -> None:
        """Look for derivatives that would be lost, once for all runs on the same shapes."""
        problem = evaluation.problem
        shapes = (x.shape if isinstance(x, Tensor) else None for x in evaluation.leaves)
        key = ("graph", id(problem.loss), self._twice, is_closed, *shapes)
        if key in problem.remembered:
            return

        outputs = [self.loss, *tree.floating(self.outputs)]
        users = (problem.module, problem.forward, problem.loss)
        check_graph(outputs, own, users, closed=is_closed, twice=self._twice)
        problem.remember(key, True)

    @opened_once
    def loss_passes_by(self):
        """Whether the loss is no function of the outputs alone, as where it differentiates them."""
        return passes_by(self.loss, tree.floating(self.outputs), self.leaves.values())

    @opened_once
    def grads(self):
        pairs = zip(self.calls, self.layer_inputs, strict=True)
        chosen = [i for i, pair in enumerate(pairs) if self._takes_gradient(*pair)]
        inputs = [*self.leaves.values(), *(self.edges[i] for i in chosen)]
        graph = self._twice and self._graph_of_grads is None
        everything = self._gradient(self.loss, None, inputs, graph, self._keep)
        n = len(self.leaves)
        grads = dict(zip(self.leaves, everything[:n], strict=True))
        of_layers = self._placed(everything[n:], chosen)
        if not graph:
            return grads, of_layers
        self._graph_of_grads = grads
        return detach(grads), [g.detach() for g in of_layers]

    def pull(self, cotangents, keep, names=None):
        leaves = {k: self.leaves[k] for k in (self.leaves if names is None else names)}
        given = tree.floating(cotangents)
        keep = keep or is_differentiated(given)

        def product(given):
            return self._pull(given, [*leaves.values()], keep=keep)

        def adjoint(vector):
            chosen = dict(zip(leaves, vector, strict=True))
            whole = {k: chosen.get(k, torch.zeros_like(x)) for k, x in self.leaves.items()}
            return tree.floating(self.jvp(None, whole, True))

        return dict(zip(leaves, linear_map(product, adjoint, given), strict=True))

    def pull_layers(self, cotangents, keep, chosen=None):
        if chosen is None:
            return self._pull(cotangents, self.edges, keep=keep)
        pulled = self._pull(cotangents, [self.edges[i] for i in chosen], keep=keep)
        return self._placed(pulled, chosen)

    def _placed(self, gradients: Sequence[Tensor], chosen: Sequence[int]) -> Sequence[Tensor]:
        """A gradient for each call, which is zero and takes no memory if it is not chosen."""
        zero = next(iter(self.leaves.values())).new_zeros(())
        found = [zero.expand(call.shape) for call in self.calls]
        for i, g in zip(chosen, gradients, strict=True):
            found[i] = g
        return found

    def hvp(self, evaluation, vector, keep):
        if not self._twice:
            msg = "products with the Hessian need twice=True: set it in the Evaluation or the Need"
            raise RuntimeError(msg)
        if self._graph_of_grads is None:
            # Only the graph of these gradients is used, not their values.
            with self._spared.switched_on():
                grads = self._gradient(self.loss, None, [*self.leaves.values()], create_graph=True)
            self._graph_of_grads = dict(zip(self.leaves, grads, strict=True))
        graph, given = self._graph_of_grads, [vector[k] for k in self.leaves]
        keep = keep or is_differentiated(given)

        def product(given):
            v = dict(zip(self.leaves, given, strict=True))
            return [*self._through(graph, v, self.leaves, keep).values()]

        return dict(zip(self.leaves, linear_map(product, product, given), strict=True))

    def jvp(self, evaluation, vector, keep):
        given = [vector[k] for k in self.leaves]
        keep = keep or is_differentiated(given)
        seed, pulled = self._transposed
        if not keep:
            del self._transposed

        def product(given):
            v = dict(zip(self.leaves, given, strict=True))
            return [*self._through(pulled, v, dict(enumerate(seed)), keep).values()]

        def adjoint(cotangents):
            return [*self.pull(cotangents, True).values()]

        return tree.with_floating(self.outputs, linear_map(product, adjoint, given))

    @opened_once
    def _transposed(self):
        """``u -> J^T u`` as a graph in ``u`` without values; its pull-back is ``J``."""
        zeros = SymbolicZeros()
        seed = [zeros.zeros_like(x).requires_grad_() for x in tree.floating(self.outputs)]
        with zeros:
            pulled = self._pull(seed, [*self.leaves.values()], create_graph=True)
        return seed, dict(zip(self.leaves, pulled, strict=True))

    def _through(self, graph, vector, inputs, keep=True):
        """Pull a vector back through a graph of gradients to the inputs of the graph."""
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
            for x, u in zip(tree.floating(self.outputs), tree.floating(cotangents), strict=True)
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
                    "a call with keep=False has freed the graph of this run, so it must be the "
                    "last call: leave out keep=False, or make a new evaluation of the batch"
                )
                raise RuntimeError(msg) from error
        return [self._zero(x) if g is None else g for g, x in zip(found, inputs, strict=True)]

    def _zero(self, unreached):
        """A gradient of zero, for a tensor or an edge that the outputs do not depend on."""
        if isinstance(unreached, Tensor):
            return torch.zeros_like(unreached)
        like = next(iter(self.leaves.values()))
        return like.new_zeros(self.calls[self.edges.index(unreached)].shape)
