"""One batch at one point: the library's only autodiff.

An :class:`Evaluation` runs the model forward once and shares that run among all that is asked of
it: the loss and its gradient, pull-backs of any cotangents to the parameters or to the layers'
outputs, Hessian and Jacobian products. Each is opened at most once, when first asked for.

Two routes lead to the same numbers. Where no transform is active the run is an ordinary autograd
graph of this call alone: a layer's output gradient is then the gradient at its edge in the graph,
and a pull-back computes what it is asked for and nothing else. Under ``vmap``, ``grad``, ``jvp`` or
``torch.compile`` it is built from ``torch.func.vjp``, with a zero added to each layer's output.
Never from ``torch.func.hessian``, ``jvp`` of ``jacrev`` or ``grad`` of ``jvp``, which torch 2.13
gets wrong for normalisation layers, and never from ``linearize``.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vjp, vmap

from funcprecond import tree
from funcprecond.autodiff.missing_derivatives import explained
from funcprecond.autodiff.recorder import Call, Capture
from funcprecond.autodiff.rules.layer_norm import Spared
from funcprecond.autodiff.runs import (
    ForwardRun,
    FunctionRun,
    GraphRun,
    opened_once,
    renamed,
)
from funcprecond.linalg.precision import wide_dtype
from funcprecond.problems import Buffers, Params, Problem, detach, example_count
from funcprecond.tracing import untransformed

__all__ = ["Evaluation"]


class Evaluation:
    """One batch at one point of a problem.

    Args:
        problem, params, batch: what is evaluated, and where.
        buffers: the model's buffers; the problem's own by default.
        masks: dropout masks drawn beforehand; the missing ones are drawn from ``generator``.
        generator: see ``masks``.
        taps: record the layers, so that :attr:`calls`, :attr:`layer_inputs` and :meth:`pull_layers`
            work.
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
        taps: bool = False,
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
        self._taps = taps
        self._keep = keep
        plain = untransformed((params, self._buffers, batch))
        self._twice = twice or not plain
        if not plain:
            # A compiler would guard on the identity of a batch that the layers are asked about.
            self.inputs = tree.map(
                lambda x: x.view_as(x) if isinstance(x, Tensor) else x, self.inputs
            )
        differentiated = GraphRun if plain else FunctionRun
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
    def calls(self) -> list[Call]:
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
        """The loss's reduction constant ``c``."""
        return self.problem.loss.constant(self.outputs, self.targets)

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
        """
        self._refuse_coupling()
        count = self.count
        chosen = {k: self.params[k] for k in names}

        def one(inputs, masks, cotangent):
            def f(sub):
                single = tree.map(lambda x, d: x.unsqueeze(0) if d == 0 else x, inputs, dims)
                masks_ = tuple(m.unsqueeze(0) for m in masks)
                capture = Capture({}, masks=masks_, twice=True)
                with capture:
                    outputs, _ = self.problem.forward({**self.params, **sub}, self._buffers, single)
                return tree.map(lambda x: x.squeeze(0), outputs)

            return vjp(f, chosen)[1](cotangent)[0]

        dims = tree.map(
            lambda x: 0 if isinstance(x, Tensor) and x.ndim and x.shape[0] == count else None,
            self.inputs,
        )
        mapped = vmap(one, (dims, 0, 0), chunk_size=chunk_size)
        try:
            return mapped(self.inputs, self.masks, cotangents)
        except RuntimeError as error:
            msg = (
                f"the per-example gradients of {list(names)} could not be taken by vmap over the "
                f"model (torch: {str(error).splitlines()[0]}); rewrite that part of the model, or "
                "leave these parameters to another method with fp.partition"
            )
            raise RuntimeError(msg) from error

    def examples_lead(self) -> list[bool]:
        """For each call, whether axis 0 of its output counts the examples.

        Its length tells, unless the inputs have another axis that is N long: inside of attention
        the first axis may be the position. Then the model is run once more, without gradient, on
        the first example alone. Where it couples the examples, as a BatchNorm in training mode
        does, the length has to do.
        """
        count = self.count
        shapes = [x.shape for x in tree.leaves(self.inputs) if isinstance(x, Tensor)]
        if not any(count in shape[1:] for shape in shapes) or self.problem.couples_examples():
            return [call.shape[:1] == (count,) for call in self.calls]
        inputs = tree.map(
            lambda x: x[:1] if isinstance(x, Tensor) and x.ndim and x.shape[0] == count else x,
            self.inputs,
        )
        params = renamed(self.params)
        capture = Capture(params, lambda z: z, tuple(m[:1] for m in self.masks))
        with torch.no_grad(), capture:
            self.problem.forward(params, self._buffers, inputs)
        if len(capture.calls) != len(self.calls):
            return [False] * len(self.calls)
        return [
            whole.shape[:1] == (count,) and one.shape == (1, *whole.shape[1:])
            for whole, one in zip(self.calls, capture.calls, strict=True)
        ]

    def objective(self, params: Params) -> tuple[Tensor, Params]:
        """(loss, gradient) at another point: the same batch, buffers and dropout masks."""
        self._run.loss  # noqa: B018 - the masks are drawn by the first run
        if untransformed((params, self._buffers, self.inputs)):
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
        """``vector · G vector``, a 0-d tensor, summed :func:`wide`: no pull-back is needed."""
        pushed = self.jvp(vector)
        pairs = zip(tree.leaves(pushed), tree.leaves(self.output_hessian_mv(pushed)), strict=True)
        return torch.stack([(u * c).sum(dtype=wide_dtype(u)) for u, c in pairs]).sum()

    def output_hessian_mv(self, pushed: Any) -> Any:
        """The loss's Hessian in the outputs times a tree shaped like the outputs."""
        return self.problem.loss.hessian_product(self.outputs, self.targets, pushed)

    # ------------------------------------------------------------------------------------ internals
    def _refuse_coupling(self) -> None:
        if coupling := self.problem.couples_examples():
            msg = (
                f"per-example gradients are not defined: {coupling} couples the examples of a "
                "batch; put it in eval mode, or use GroupNorm"
            )
            raise ValueError(msg)

    def _forward(
        self, params: Params, tap: Callable | None, spared: Spared | None = None
    ) -> tuple[Any, Buffers, Capture]:
        capture = Capture(params, tap, self.masks, self._generator, self._twice, spared)
        with _no_checkpoints(), capture:
            outputs, buffers = self.problem.forward(params, self._buffers, self.inputs)
        self.masks = tuple(capture.masks)
        return outputs, buffers, capture

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
