"""Layer statistics from a training loop's own forward run.

A :class:`Watcher` records the layers while the loop runs its model. It recognises the loss as it
recognises layers, by the torch function that is called. At this moment the outputs and the targets
are known, so that the needs of a method can be measured: their cotangents are pulled back through
the graph of this run, which stays as it is for the loop's own backward pass.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from funcprecond import tree
from funcprecond.autodiff import attention
from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.autodiff.examples import Examples
from funcprecond.autodiff.graph_check import nodes
from funcprecond.autodiff.graph_run import GraphRun
from funcprecond.autodiff.layer_recorder import LayerRecorder
from funcprecond.losses import Loss
from funcprecond.need import Need
from funcprecond.optim.losses import RECOGNISED, recognised
from funcprecond.optim.places import find_by_gradients
from funcprecond.problems import REMEMBERED, Problem
from funcprecond.tracing import unseen_by_modes
from funcprecond.tree import Params

__all__ = ["Measured", "Watcher"]


class Measured:
    """What one run has given for the needs of a method.

    Attributes:
        values: the measured value of each need.
        constant: the reduction constant of the loss, a 0-d tensor.
        is_sum: whether the loss is a sum; the constant is then what it was multiplied by later.
        factor: the derivative, in this loss, of what was differentiated; None before that.
        is_half: whether autocast was to float16, where a ``GradScaler`` multiplies the factor.
    """

    def __init__(self, values: dict[Need, Any], constant: Tensor, is_sum: bool, is_half: bool):
        self.values, self.constant = values, constant
        self.is_sum, self.is_half = is_sum, is_half
        self.factor: Tensor | None = None

    def note(self, factor: Tensor) -> None:
        """Note that a backward pass went through the loss."""
        self.factor = factor.detach()


class Watcher(TorchFunctionMode):
    """The mode that records the layers and the loss of a run that belongs to somebody else.

    Args:
        params: the parameters by name.
        needs: the needs to measure.
        generator: the source of the sampled labels.
        places: what was found out about earlier runs, see :class:`WatchedEvaluation`.
        own_loss: whether only :meth:`computed` reports a loss, and no torch function is recognised.

    Attributes:
        params: as given.
        measured: the measurement; None before the loss is computed.
        unknown: the names of the loss functions that were called and cannot be used.
    """

    def __init__(
        self,
        params: Params,
        needs: Sequence[Need],
        generator: torch.Generator,
        places: dict[tuple, Examples],
        own_loss: bool = False,
    ):
        super().__init__()
        self.params, self._needs, self._generator = params, needs, generator
        self._places, self._own_loss = places, own_loss
        self.edges: list[Any] = []
        self.layers = LayerRecorder(params, self._tapped, in_graph=True)
        self.measured: Measured | None = None
        self.unknown: list[str] = []

    def _tapped(self, output: Tensor) -> Tensor:
        self.edges.append(get_gradient_edge(output))
        return output

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in attention.COMPOSITES:
            with self:
                return attention.COMPOSITES[func](*args, **kwargs)
        if self.measured is None and torch.is_grad_enabled():
            out = self.layers.record(func, func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        if func in RECOGNISED or getattr(func, "__name__", "").endswith("loss"):
            self._may_be_the_loss(func, args, kwargs, out)
        return out

    def _may_be_the_loss(self, func, args, kwargs, out) -> None:
        if self._own_loss or not isinstance(out, Tensor) or not out.requires_grad:
            return
        found = recognised(func, args, kwargs)
        if found is None:
            self.unknown.append(func.__name__)
        else:
            self.computed(*found, out)

    def computed(self, loss: Loss, outputs: Any, targets: Any, value: Tensor) -> None:
        """Measure the needs, because the loss was computed.

        Args:
            loss: the loss.
            outputs, targets: its arguments.
            value: its value, with the graph of the run.

        Raises:
            RuntimeError: this is the second loss of the run.
        """
        if not value.requires_grad:
            return
        if self.measured is not None:
            msg = (
                "two losses were computed in one watch, and how they are combined is not known: "
                "write one `with opt.watch():` for each batch, and compute in it one loss of which "
                "the model is trained; or pass a loss that combines both as loss= to the "
                "optimizer, and call it as opt.loss(outputs, targets)"
            )
            raise RuntimeError(msg)
        problem = Problem(_runs_elsewhere, loss, self.params, {}, lambda batch: batch)
        batch = None, targets
        noise = {n: n.draw(problem, self.params, batch, self._generator) for n in self._needs}
        # The mode must not see what is computed here.
        with unseen_by_modes(), torch.no_grad():
            run = WatchedRun(self, outputs, value)
            evaluation = WatchedEvaluation(problem, run, targets, self._places)
            values = {n: n.measure(evaluation, noise[n]) for n in self._needs}
            constant = evaluation.constant
        is_half = torch.is_autocast_enabled(value.device.type)
        is_half = is_half and torch.get_autocast_dtype(value.device.type) is torch.float16
        self.measured = Measured(values, constant, loss.is_sum, is_half)
        value.register_hook(self.measured.note)
        # Nothing of the run is kept.
        self.layers, self.edges = LayerRecorder({}, self._tapped), []


def _runs_elsewhere(*_: Any) -> Any:
    msg = (
        "this measurement has to run the model again, which a watched loop does not allow: use "
        "opt.step(closure), or fp.observe"
    )
    raise RuntimeError(msg)


class WatchedRun(GraphRun):
    """A run that a training loop has made, with the interface of :class:`GraphRun`."""

    def __init__(self, watcher: Watcher, outputs: Any, loss: Tensor):
        self._twice, self._keep = False, True
        self.leaves, self.outputs, self.loss = watcher.params, outputs, loss
        layers, ends = watcher.layers, tree.floating(outputs)
        layers.finish(outputs)
        # Calls that the outputs do not depend on belong to something else, such as a metric.
        reached = {*nodes(ends)}
        kept = [i for i, edge in enumerate(watcher.edges) if edge.node in reached]
        self.calls = [layers.calls[i] for i in kept]
        self.layer_inputs = [layers.inputs[i].detach() for i in kept]
        self.edges = [watcher.edges[i] for i in kept]
        # The graph tells which uses there are, and the recorder what some of them are called. A
        # loop also touches parameters without using them, as where it reads their gradients.
        hidden = layers.hidden_uses(ends)
        self.unrecorded = {k: layers.unrecorded.get(k, why) for k, why in hidden.items()}
        self.buffers = {}

    @property
    def grads(self):
        """The gradients in the outputs of the layers; those in the parameters are not computed."""
        return {}, self._gradient(self.loss, None, self.edges)


class WatchedEvaluation(Evaluation):
    """The evaluation of a run that a training loop has made.

    ``places`` remembers where the examples are, by the shapes of the outputs and of the layers.
    """

    def __init__(
        self, problem: Problem, run: WatchedRun, targets: Any, places: dict[tuple, Examples]
    ):
        self.problem, self.params, self.targets = problem, problem.params, targets
        self.inputs, self.masks, self._blocks, self._run = None, (), {}, run
        self._places, self.is_last = places, False

    @property
    def grads(self) -> Params:
        """See :class:`funcprecond.Evaluation`."""
        leaves = self._run.leaves
        return dict(
            zip(leaves, self._run._gradient(self.loss, None, [*leaves.values()]), strict=True)
        )

    @property
    def examples(self) -> Examples:
        run = self._run
        shapes = [x.shape for x in tree.floating(run.outputs)]
        key = (*shapes, *(call.shape for call in run.calls))
        if key not in self._places:
            if len(self._places) >= REMEMBERED:
                self._places.clear()
            # The squares of other parameters are estimated, as their rows would need N pull-backs.
            why = "the model was run by your own loop, in which no example can be run alone"
            self._places[key] = dataclasses.replace(find_by_gradients(run), coupling=why)
        return self._places[key]
