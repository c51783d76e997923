"""One batch at one point: the library's only autodiff.

An :class:`Evaluation` runs the model forward once and shares that run among all that is asked of
it: the loss and its gradient, pull-backs of any cotangents to the parameters or to the layers'
outputs, Hessian and Jacobian products. Each is opened at most once, when first asked for.

Two ways lead to the same numbers. Where nothing traces, the run is an ordinary autograd graph of
this call alone: a layer's output gradient is then the gradient at its edge in the graph, and a
pull-back computes what it is asked for and nothing else. Under ``vmap``, ``grad``, ``jvp`` or
``torch.compile`` it is built from ``torch.func.vjp``, with a zero added to each layer's output. It
is never built from ``torch.func.hessian``, ``jvp`` of ``jacrev`` or ``grad`` of ``jvp``, which torch
2.13 gets wrong for normalisation layers, and never from ``linearize``.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value

from funcprecond import tree
from funcprecond.autodiff import examples
from funcprecond.autodiff.function_run import ForwardRun, FunctionRun
from funcprecond.autodiff.graph_run import GraphRun
from funcprecond.autodiff.missing_derivatives import explained
from funcprecond.autodiff.once import opened_once
from funcprecond.autodiff.recorder import Recorder
from funcprecond.autodiff.rules.backward import Spared
from funcprecond.layers.blocks import complete_blocks
from funcprecond.layers.layer_call import LayerCall
from funcprecond.linalg.precision import wide_dtype
from funcprecond.losses.base import Labels
from funcprecond.problems import Problem, detach, example_count
from funcprecond.tracing import is_eager
from funcprecond.tree import Buffers, Params

__all__ = ["Evaluation"]


class Evaluation:
    """One batch at one point of a problem.

    Args:
        problem, params, batch: what is evaluated, and where.
        buffers: the model's buffers; the problem's own by default.
        masks: dropout masks drawn beforehand; the missing ones are drawn from ``generator``.
        generator: see ``masks``.
        layers: record the layers, so that :attr:`calls`, :attr:`layer_inputs` and
            :meth:`pull_layers` work.
        twice: products with the Hessian or the Jacobian will be asked for.
        keep: more than the gradient will be asked for; if not, its graph is freed by the gradient.
        forward_only: nothing will be pulled back, so that no graph is made for it.

    Attributes:
        inputs, targets: the batch's two halves.
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
    ):
        self.problem = problem
        self.params = params
        self.inputs, self.targets = problem.split(batch)
        self.masks = tuple(masks)
        self._buffers = problem.buffers if buffers is None else buffers
        self._generator = generator
        self._layers = layers
        self._keep = keep
        self._blocks: dict[tuple[bool, bool], dict[str, list[int]]] = {}
        eager = is_eager((params, self._buffers, batch))
        self._twice = twice or not eager
        if not eager:
            # A compiler would guard on the identity of a batch that the layers are asked about.
            self.inputs = tree.map(
                lambda x: x.view_as(x) if isinstance(x, Tensor) else x, self.inputs
            )
        differentiated = GraphRun if eager else FunctionRun
        self._run: Any = (ForwardRun if forward_only else differentiated)(self)

    # --------------------------------------------------------------------------- the forward run
    @property
    def outputs(self) -> Any:
        """The model's outputs."""
        return detach(self._run.outputs) if isinstance(self._run, GraphRun) else self._run.outputs

    @property
    def buffers(self) -> Buffers:
        """The model's buffers after the run."""
        return self._run.buffers

    @opened_once
    def count(self) -> int:
        """N, the number of examples."""
        return example_count(self._run.outputs)

    @property
    def calls(self) -> list[LayerCall]:
        """The layers' calls, in order."""
        return self._run.calls

    @property
    def layer_inputs(self) -> Sequence[Tensor]:
        """The input of each call."""
        return self._run.layer_inputs

    @property
    def unrecorded(self) -> dict[str, str]:
        """Parameters with a use that is not among the calls, and by which function."""
        return self._run.unrecorded

    def blocks(self, *, per_sample: bool = False, tied: bool = False) -> dict[str, list[int]]:
        """The indices of the calls of each block, see :func:`funcprecond.layers.blocks.complete_blocks`.

        Args:
            per_sample: leave out the blocks whose calls do not tell the examples apart.
            tied: keep a block that is an embedding and a linear layer too.
        """
        key = (per_sample, tied)
        if key not in self._blocks:
            lead = examples.lead(self) if per_sample else [True] * len(self.calls)
            self._blocks[key] = complete_blocks(self.calls, self.unrecorded, lead, tied)
        return self._blocks[key]

    # --------------------------------------------------------------------------- first derivatives
    @property
    def loss(self) -> Tensor:
        """The loss, a 0-d tensor."""
        return self._run.loss.detach() if isinstance(self._run, GraphRun) else self._run.loss

    @property
    @explained
    def grads(self) -> Params:
        """The gradient of the loss."""
        return self._run.grads[0]

    @property
    @explained
    def layer_grads(self) -> Sequence[Tensor]:
        """The gradient of the loss with respect to each call's output."""
        return self._run.grads[1]

    @opened_once
    def constant(self) -> Tensor:
        """The loss's reduction constant ``c``, a 0-d tensor."""
        return self.problem.loss.constant(self.outputs, self.targets)

    @explained
    def cotangents(self, labels: Labels, noise: Any) -> list[Any]:
        """What is pulled back for a Fisher matrix, each shaped like the outputs, without ``c``.

        Args:
            labels: "empirical" for one cotangent, at the data's own labels; "mc" for one for each
                sampled label; "exact" for one for each entry of an example's output.
            noise: the random numbers of "mc", from the loss's ``label_noise``.

        Raises:
            TypeError: the loss is not a likelihood that is known, and ``labels`` is not
                "empirical".
        """
        loss, outputs, targets = self.problem.loss, self.outputs, self.targets
        if labels == "empirical":
            return [loss.empirical(outputs, targets)]
        if labels == "mc":
            return list(loss.sampled(outputs, targets, noise))
        return list(loss.exact(outputs, targets))

    @explained
    def pull(self, cotangents: Any, keep: bool = True) -> Params:
        """``J^T cotangents``: the cotangents are shaped like the outputs. About 0.7 gradients.

        Without ``keep`` it is the last question: the graph is freed as it goes, here and below.
        """
        return self._run.pull(cotangents, keep)

    @explained
    def pull_layers(self, cotangents: Any, keep: bool = True) -> Sequence[Tensor]:
        """The cotangents pulled back to each call's output. About 0.3 gradients."""
        return self._run.pull_layers(cotangents, keep)

    def pull_each(
        self, cotangents: Any, names: Sequence[str], chunk_size: int | None = None
    ) -> Params:
        """For each example its own ``J_n^T cotangents_n``, in the named parameters.

        Returns:
            (N, *shape) for each name.

        Raises:
            ValueError: the model couples the examples of a batch.
            RuntimeError: ``vmap`` cannot run the model.
        """
        return examples.pull_each(self, cotangents, names, chunk_size)

    def objective(self, params: Params) -> tuple[Tensor, Params]:
        """(loss, gradient) at another point: the same batch, buffers and dropout masks."""
        self._run.loss  # noqa: B018 - the masks are drawn by the first run
        if is_eager((params, self._buffers, self.inputs)):
            run = GraphRun(self, params)
            return run.loss.detach(), run.grads[0]
        gradient, value = grad_and_value(lambda p: self._loss(p)[0])(params)
        return value, gradient

    def value(self, params: Params) -> Tensor:
        """The loss at another point: the same batch, buffers and dropout masks."""
        self._run.loss  # noqa: B018
        with torch.no_grad():
            return self._loss(params)[0]

    # -------------------------------------------------------------------------- second derivatives
    @explained
    def hvp(self, vector: Params, keep: bool = True) -> Params:
        """The loss's Hessian times a vector. The first call opens the second-order graph."""
        return self._run.hvp(self, vector, keep)

    @explained
    def jvp(self, vector: Params, keep: bool = True) -> Any:
        """``J vector``, shaped like the outputs, with the masks and kernels of the forward run.

        Without ``keep`` it is the last one, but the transpose can be asked for still.
        """
        return self._run.jvp(self, vector, keep)

    @explained
    def ggn_mv(self, vector: Params, keep: bool = True) -> Params:
        """The Gauss-Newton matrix ``J^T H_L J`` of the loss times a vector."""
        return self.pull(self.output_hessian_mv(self.jvp(vector, keep)), keep)

    @explained
    def ggn_form(self, vector: Params) -> Tensor:
        """``vector · G vector``, a 0-d tensor, summed wide: no pull-back is needed."""
        pushed = self.jvp(vector)
        pairs = zip(tree.leaves(pushed), tree.leaves(self.output_hessian_mv(pushed)), strict=True)
        return torch.stack([(u * c).sum(dtype=wide_dtype(u)) for u, c in pairs]).sum()

    def output_hessian_mv(self, pushed: Any) -> Any:
        """The loss's Hessian in the outputs times a tree shaped like the outputs."""
        return self.problem.loss.hessian_product(self.outputs, self.targets, pushed)

    # ------------------------------------------------------------------------------------ internals
    def _forward(
        self, params: Params, tap: Callable | None, spared: Spared | None = None
    ) -> tuple[Any, Buffers, Recorder]:
        recorder = Recorder(params, tap, self.masks, self._generator, self._twice, spared)
        with _no_checkpoints(), recorder:
            outputs, buffers = self.problem.forward(params, self._buffers, self.inputs)
        self.masks = tuple(recorder.masks)
        return outputs, buffers, recorder

    def _loss(self, params: Params) -> tuple[Tensor, Any]:
        outputs, buffers, _ = self._forward(params, None)
        return self.problem.loss(outputs, self.targets), (outputs, buffers)


def _no_checkpoints() -> AbstractContextManager:
    """Refuses activation checkpointing: what it recomputes is at the module's own parameters."""
    if torch.compiler.is_compiling():
        return nullcontext()
    return torch.autograd.graph.disable_saved_tensors_hooks(
        "activation checkpointing recomputes a layer at the module's own parameters, not at those "
        "that were passed in: switch it off in the model (torch.utils.checkpoint, or "
        "gradient_checkpointing_disable() in transformers), and use smaller batches"
    )
