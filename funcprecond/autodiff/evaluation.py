"""The evaluation of one batch at one point, from which all derivatives of a model are taken.

An :class:`Evaluation` runs the model forward once and shares this run among all requests: the loss
and its gradient, pull-backs of cotangents to the parameters or to the outputs of the layers, and
products with the Hessian and the Jacobian. The graph for each of them is built at its first use,
and only once.

There are two implementations with the same results. Where nothing traces the call, the run is an
ordinary autograd graph that belongs to this call alone. The output gradient of a layer is then the
gradient at its edge in the graph, and a pull-back computes only what is requested. Under ``vmap``,
``grad``, ``jvp`` or ``torch.compile``, the run is built with ``torch.func.vjp``, and a zero tensor
is added to the output of each layer, whose gradient is the output gradient of the layer. It is
never built with ``torch.func.hessian``, with ``jvp`` of ``jacrev`` or with ``grad`` of ``jvp``,
which give wrong results for normalization layers in torch 2.13, nor with ``torch.func.linearize``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value

from funcprecond import tree
from funcprecond.autodiff.examples import Examples, find
from funcprecond.autodiff.function_run import ForwardRun, FunctionRun
from funcprecond.autodiff.graph_check import no_checkpoints
from funcprecond.autodiff.graph_run import GraphRun
from funcprecond.autodiff.missing_derivatives import explained
from funcprecond.autodiff.once import opened_once, renamed
from funcprecond.autodiff.point_rows import point_rows
from funcprecond.autodiff.recorder import Recorder
from funcprecond.autodiff.reminders import remind_of_curvature, remind_of_shift
from funcprecond.autodiff.single_examples import pull_each
from funcprecond.layers.blocks import complete_blocks
from funcprecond.layers.layer_call import LayerCall
from funcprecond.layers.place import Place
from funcprecond.linalg.precision import wide_dtype
from funcprecond.losses.base import Labels
from funcprecond.problems import Problem, detach
from funcprecond.tracing import is_eager
from funcprecond.tree import Buffers, Params

__all__ = ["Evaluation"]


class Evaluation:
    """The forward run of a problem on one batch at one point, and its derivatives.

    J is the Jacobian of the outputs in the parameters, N the number of examples, and ``c`` the
    reduction constant of the loss (:mod:`funcprecond.losses`).

    Args:
        problem, params, batch: the problem, the point and the batch.
        buffers: the model's buffers; by default the initial ones of the problem.
        masks: dropout masks drawn beforehand, in the order in which the model draws them. Missing
            masks are drawn from ``generator``.
        generator: the source of the missing dropout masks.
        layers: whether to record the layers, which :attr:`calls`, :attr:`layer_inputs`,
            :attr:`layer_grads` and :meth:`pull_layers` require.
        twice: whether products with the Hessian or the Jacobian will be requested.
        keep: whether more than the gradient will be requested. If not, the computation of the
            gradient frees the graph.
        forward_only: whether only the outputs, the buffers and the inputs of the layers will be
            requested, so that no graph for derivatives is built.
        takes_gradient: a function ``(call, input) -> bool``: whether :attr:`layer_grads` will be
            used for a recorded call; by default for all of them. The others are not kept.

    Attributes:
        problem, params: as given.
        is_last: whether the measurement that is being taken is the last one, which may free the
            graph.
        inputs, targets: the two parts of the batch.
        masks: all dropout masks of the run.

    Raises:
        ValueError: the batch is empty, or dropout masks are missing and there is no generator.
        KeyError: the names in ``params`` or ``buffers`` do not fit the model.
        RuntimeError: the model does something that cannot be observed, such as activation
            checkpointing or a draw from torch's global generator.
        NotImplementedError: here and in the methods, torch has no derivative for a part of the
            model or the loss.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(4, 3), fp.losses.mse)
        >>> batch = torch.ones(8, 4), torch.zeros(8, 3)
        >>> evaluation = fp.Evaluation(problem, problem.params, batch, twice=True)
        >>> evaluation.grads["weight"].shape
        torch.Size([3, 4])
        >>> evaluation.jvp(problem.params).shape
        torch.Size([8, 3])
    """

    @explained
    def __init__(
        self,
        problem: Problem,
        params: Params,
        batch: Any,
        *,
        buffers: Buffers | None = None,
        masks: tuple[Tensor, ...] = (),
        generator: torch.Generator | None = None,
        layers: bool = False,
        twice: bool = False,
        keep: bool = True,
        forward_only: bool = False,
        takes_gradient: Callable[[LayerCall, Tensor], bool] = lambda call, x: True,
    ):
        self.problem = problem
        self.params = params
        self.inputs, self.targets = problem.split(batch)
        tree.see_inside(self.inputs)
        self.masks = tuple(masks)
        self._buffers = problem.buffers if buffers is None else buffers
        self._generator = generator
        self._layers = layers and not problem.by_points
        self._keep = keep
        self._takes_gradient = takes_gradient
        self.is_last = False
        # Runs on the single examples, kept by :func:`pull_each` for other cotangents.
        self.more_runs: dict[Any, Any] = {}
        self._blocks: dict[tuple[bool, ...], dict[str, list[tuple[int, LayerCall]]]] = {}
        eager = is_eager((params, self._buffers, batch))
        self._twice = twice or not eager
        if eager and not problem.reminded["shift"]:
            remind_of_shift(problem, batch)
        if not eager:
            # New views of the batch and the buffers: the recorder compares identities of tensors,
            # and a compiler would guard on these.
            self.inputs = tree.map(
                lambda x: x.view_as(x) if isinstance(x, Tensor) else x, self.inputs
            )
            self._buffers = renamed(self._buffers)
        differentiated = GraphRun if eager else FunctionRun
        self._run: Any = (ForwardRun if forward_only else differentiated)(self)

    # --------------------------------------------------------------------------- the forward run
    @property
    def outputs(self) -> Any:
        """The outputs of the model."""
        return detach(self._run.outputs) if isinstance(self._run, GraphRun) else self._run.outputs

    @property
    def buffers(self) -> Buffers:
        """The buffers of the model after the run."""
        return self._run.buffers

    @opened_once
    def examples(self) -> Examples:
        """Where the examples are in inputs, outputs and layers, and whether they are apart."""
        return find(self)

    @property
    def count(self) -> int:
        """The number of examples, N."""
        return self.examples.count

    @property
    def leaves(self) -> list[Any]:
        """The leaves of the inputs."""
        return [self.inputs] if isinstance(self.inputs, Tensor) else tree.leaves(self.inputs)

    @property
    def calls(self) -> list[LayerCall]:
        """The recorded calls of layers, in order."""
        return self._run.calls

    @property
    def layer_inputs(self) -> Sequence[Tensor]:
        """The input of each recorded call."""
        return self._run.layer_inputs

    @property
    def unrecorded(self) -> dict[str, str]:
        """The parameters with a use outside the recorded calls, and the function that uses each."""
        return self._run.unrecorded

    def blocks(
        self, *, per_sample: bool = False, tied: bool = False, shared: bool = True
    ) -> dict[str, list[tuple[int, LayerCall]]]:
        """Group the recorded calls by block, see :func:`funcprecond.layers.blocks.complete_blocks`.

        A block whose kind needs the gradients of single examples is left out if they cannot be told
        apart.

        Args:
            per_sample: whether to leave out the blocks with a call in whose output the examples
                cannot be told apart.
            tied: whether to keep a block whose weight is used by embeddings and by linear layers.
            shared: whether to keep a block with a call whose output all examples share. Its output
                gradients are sums over the examples. Their outer products are those of the examples
                in the mean over sampled labels, but not with other labels.

        Returns:
            The indices of the calls of each block, and the part of each call that belongs to it.
        """
        key = (per_sample, tied, shared)
        if key not in self._blocks:
            usable = [True] * len(self.calls)
            if not shared and self.examples.shared:
                usable = [not x for x in self.examples.shared]
            for i, call in enumerate(self.calls):
                if per_sample or call.needs_examples:
                    place = self.examples.calls[i]
                    usable[i] &= place is not None and call.takes(place)
            self._blocks[key] = complete_blocks(self.calls, self.unrecorded, usable, tied)
        return self._blocks[key]

    # --------------------------------------------------------------------------- first derivatives
    @property
    def loss(self) -> Tensor:
        """The loss, a 0-d tensor."""
        return self._run.loss.detach() if isinstance(self._run, GraphRun) else self._run.loss

    @property
    @explained
    def grads(self) -> Params:
        """The gradient of the loss, shaped like ``params``."""
        return self._run.grads[0]

    @property
    @explained
    def layer_grads(self) -> Sequence[Tensor]:
        """The gradient of the loss in the output of each recorded call.

        Raises:
            TypeError: the loss differentiates the model, so that it uses the layers once more.
        """
        self._require_outputs()
        return self._run.grads[1]

    @opened_once
    def constant(self) -> Tensor:
        """The reduction constant ``c`` of the loss, a 0-d tensor."""
        return self.problem.loss.constant(self.outputs, self.targets)

    @explained
    def cotangents(self, labels: Labels, noise: Any) -> list[Any]:
        """Compute the cotangents whose pull-backs make up a Fisher matrix.

        Args:
            labels: "empirical" for one cotangent, at the labels of the data; "mc" for one cotangent
                per sampled label; "exact" for one cotangent per entry of the output of an example.
            noise: the random numbers for "mc", from the ``label_noise`` of the loss.

        Returns:
            The cotangents, each shaped like the outputs, without the factor ``c``.

        Raises:
            TypeError: the loss has no known likelihood, and ``labels`` is not "empirical"; or it
                differentiates the model.
        """
        self._require_outputs()
        loss, outputs, targets = self.problem.loss, self.outputs, self.targets
        if labels == "empirical":
            return [loss.empirical(outputs, targets)]
        if labels == "mc":
            return list(loss.sampled(outputs, targets, noise))
        exact = list(loss.exact(outputs, targets))
        (place,) = self.examples.outputs
        return [part for u in exact for part in _one_term_each(u, place)]

    @explained
    def pull(
        self, cotangents: Any, keep: bool = True, names: Sequence[str] | None = None
    ) -> Params:
        """Pull cotangents back to the parameters: ``J^T cotangents``.

        Args:
            cotangents: a tree shaped like the outputs.
            keep: whether the evaluation is used afterwards. If not, this call frees its graph.
            names: the parameters to pull back to; all by default.

        Returns:
            Shaped like ``params``, or like those of ``names``. Costs about 0.7 gradients.

        Raises:
            RuntimeError: an earlier call with ``keep=False`` has freed the graph.
        """
        return self._run.pull(cotangents, keep, names)

    @explained
    def pull_layers(
        self, cotangents: Any, keep: bool = True, chosen: Sequence[int] | None = None
    ) -> Sequence[Tensor]:
        """Pull cotangents back to the output of each recorded call.

        Args:
            cotangents, keep: see :meth:`pull`.
            chosen: the indices of the calls to pull back to; all by default.

        Returns:
            A tensor for each of :attr:`calls`, of which those that are not chosen have no meaning.
            Costs about 0.3 gradients.

        Raises:
            RuntimeError: an earlier call with ``keep=False`` has freed the graph.
        """
        return self._run.pull_layers(cotangents, keep, chosen)

    def pull_each(
        self, cotangents: Any, names: Sequence[str], chunk_size: int | None = None
    ) -> Params:
        """Pull the cotangents of each example back separately: ``J_n^T cotangents_n``.

        Args:
            cotangents: a tree shaped like the outputs.
            names: the parameters to pull back to.
            chunk_size: the number of examples at a time; None for all at once.

        Returns:
            (N, *shape) for each name.

        Raises:
            ValueError: the model couples the examples of a batch.
            RuntimeError: ``vmap`` cannot run the model.
        """
        return pull_each(self, tree.floating(cotangents), names, chunk_size)

    def point_rows(self, names: Sequence[str]) -> tuple[Params, Tensor, float] | None:
        """The Jacobian of a scientific problem, whose points are of several kinds.

        Args:
            names: the parameters.

        Returns:
            J, (R, *shape) for each name, with a row for each residual or sample; the vector r,
            (R,); and the number m for which the gradient of the loss is ``m J^T r``. Costs one
            gradient for each row, under ``vmap``. None for any other problem than those of
            :mod:`funcprecond.residual_problems`.
        """
        return point_rows(self, names)

    def objective(self, params: Params) -> tuple[Tensor, Params]:
        """Compute the loss and its gradient at another point.

        The batch, the buffers and the dropout masks are the same.

        Args:
            params: the other point.

        Returns:
            (loss, gradient). Costs one gradient.

        Raises:
            TypeError: the loss is an estimate at samples that belong to this point only.
        """
        self._require_a_function()
        if is_eager((params, self._buffers, self.inputs)):
            run = GraphRun(self, params)
            return run.loss.detach(), run.grads[0]
        gradient, value = grad_and_value(lambda p: self._loss(p)[0])(params)
        return value, gradient

    def value(self, params: Params) -> Tensor:
        """Compute the loss at another point.

        The batch, the buffers and the dropout masks are the same.

        Args:
            params: the other point.

        Returns:
            The loss, a 0-d tensor. Costs one forward run.

        Raises:
            TypeError: the loss is an estimate at samples that belong to this point only.
        """
        self._require_a_function()
        if is_eager((params, self._buffers, self.inputs)):
            # With gradients enabled, for a model that differentiates inside its own forward.
            with torch.enable_grad():
                return self._loss({k: p.detach() for k, p in params.items()})[0].detach()
        with torch.no_grad():
            return self._loss(params)[0]

    # -------------------------------------------------------------------------- second derivatives
    @explained
    def hvp(self, vector: Params, keep: bool = True) -> Params:
        """Multiply the Hessian of the loss by a vector.

        Args:
            vector: shaped like ``params``.
            keep: see :meth:`pull`.

        Returns:
            Shaped like ``params``. Costs 1.3 to 2.2 gradients, and the first call also builds the
            graph of the gradient.

        Raises:
            RuntimeError: the evaluation was made without ``twice``, or an earlier call with
                ``keep=False`` has freed the graph.
            TypeError: the loss is an estimate at samples that belong to this point only.
        """
        self._require_a_function()
        return self._run.hvp(self, vector, keep)

    @explained
    def jvp(self, vector: Params, keep: bool = True) -> Any:
        """Multiply the Jacobian of the outputs by a vector: ``J vector``.

        The dropout masks and the kernels are those of the forward run.

        Args:
            vector: shaped like ``params``.
            keep: whether there are more products with J afterwards. If not, this call frees the
                graph of J, and cotangents can still be pulled back.

        Returns:
            Shaped like the outputs. The first call also builds the graph of J.
        """
        return self._run.jvp(self, vector, keep)

    @explained
    def ggn_mv(self, vector: Params, keep: bool = True) -> Params:
        """Multiply the Gauss-Newton matrix ``G = J^T H_L J`` of the loss by a vector.

        ``H_L`` is the Hessian of the loss in the outputs.

        Args:
            vector: shaped like ``params``.
            keep: see :meth:`pull`.

        Returns:
            Shaped like ``params``. Costs 0.9 to 1.4 gradients, and the first call also builds the
            graph of J.
        """
        return self.pull(self.output_hessian_mv(self.jvp(vector, keep)), keep)

    @explained
    def ggn_form(self, vector: Params) -> Tensor:
        """Compute the quadratic form ``vector · G vector`` without a pull-back.

        Args:
            vector: shaped like ``params``.

        Returns:
            A 0-d tensor, summed in float64 where the device supports it. Costs about half of
            :meth:`ggn_mv`.
        """
        pushed = self.jvp(vector)
        curved = self.output_hessian_mv(pushed)
        pairs = zip(tree.floating(pushed), tree.floating(curved), strict=True)
        return torch.stack([(u * c).sum(dtype=wide_dtype(u)) for u, c in pairs]).sum()

    def output_hessian_mv(self, pushed: Any) -> Any:
        """Multiply the Hessian of the loss in the outputs by a tree shaped like the outputs."""
        self._require_outputs()
        self._require_a_function()
        problem, outputs, targets = self.problem, self.outputs, self.targets
        curved = problem.loss.hessian_product(outputs, targets, pushed)
        if not problem.reminded["curvature"] and is_eager((outputs, targets, pushed)):
            remind_of_curvature(problem, outputs, targets, pushed, curved)
        return curved

    # ------------------------------------------------------------------------------------ internals
    def _require_outputs(self) -> None:
        """Raise TypeError if the loss depends on the parameters other than through the outputs."""
        if isinstance(self._run, GraphRun) and self._run.loss_passes_by:
            msg = (
                "the loss depends on the parameters in another way than through the outputs of the "
                "model, as it does where it differentiates them with torch.autograd.grad, or takes "
                "tensors from an object among them, such as a distribution: its gradient and its "
                "Hessian are known, but not its Gauss-Newton and Fisher matrices, nor what its "
                "layers and its examples contribute. Take these derivatives in the model, return "
                "them and all tensors as outputs (fp.problem(..., outputs=) may choose them), and "
                "let the loss be a function of them"
            )
            raise TypeError(msg)

    def _require_a_function(self) -> None:
        """Raise TypeError if the loss has a value and a gradient at this point, and no others."""
        if self.problem.loss.at_samples:
            msg = (
                "the samples of this problem belong to the parameters that they were drawn with, "
                "so that they do not give the loss at other parameters, nor its Hessian: line "
                "searches, adaptive damping, L-BFGS and Newton's method do not apply. Use fp.sr, "
                "fp.spring or a method of the gradient"
            )
            raise TypeError(msg)

    def _forward(
        self, params: Params, tap: Callable | None, **options: Any
    ) -> tuple[Any, Buffers, Recorder]:
        recorder = Recorder(params, tap, self.masks, self._generator, self._twice, **options)
        with no_checkpoints(), recorder:
            outputs, buffers = self.problem.forward(params, self._buffers, self.inputs)
        tree.see_inside(outputs)
        self.masks = tuple(recorder.masks)
        return outputs, buffers, recorder

    def _loss(self, params: Params) -> tuple[Tensor, Any]:
        outputs, buffers, _ = self._forward(params, None)
        return self.problem.loss(outputs, self.targets), (outputs, buffers)


def _one_term_each(u: Tensor, place: Place | None) -> list[Tensor]:
    """Split a cotangent with one entry in each row of the outputs, so that no example has two."""
    if place is None or (place.axis == 0 and place.inner == 1):
        return [u]
    parts = place.split(u)
    found = []
    for i in range(parts[0].shape[0]):
        alone = torch.zeros_like(parts)
        alone[:, i] = parts[:, i]
        found.append(place.join(alone))
    return found
