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
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge
from torch.func import grad, grad_and_value, vjp, vmap

from funcprecond import tree
from funcprecond.capture import Call, Capture
from funcprecond.problem import Buffers, Params, Problem, detach, example_count

__all__ = ["Evaluation", "untransformed"]


def _opened_once(method: Callable) -> property:
    """A property computed at its first use; functools' has a lock, which compilers cannot trace."""
    name = f"_{method.__name__}_value"

    def get(self):
        if name not in self.__dict__:
            setattr(self, name, method(self))
        return getattr(self, name)

    return property(get, doc=method.__doc__)


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
        along: a vector that the forward run itself is differentiated along, in forward mode: its
            :meth:`jvp` then costs nothing more. For a single product this is the cheapest way.

    Attributes:
        inputs, targets: the batch's two halves.
    """

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
        along: Params | None = None,
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
        self._twice = twice or not plain or along is not None
        self._along = along
        if not plain:
            # A compiler would guard on the identity of a batch that the layers are asked about.
            self.inputs = tree.map(
                lambda x: x.view_as(x) if isinstance(x, Tensor) else x, self.inputs
            )
        self._run = (_GraphRun if plain else _FunctionRun)(self)

    # --------------------------------------------------------------------------- the forward run
    @property
    def outputs(self) -> Any:
        """The model's outputs."""
        return detach(self._run.outputs) if isinstance(self._run, _GraphRun) else self._run.outputs

    @property
    def buffers(self) -> Buffers:
        """The model's buffers after the run."""
        return self._run.buffers

    @_opened_once
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
        return self._run.loss.detach() if isinstance(self._run, _GraphRun) else self._run.loss

    @property
    def grads(self) -> Params:
        """The gradient of the loss."""
        return self._run.grads[0]

    @property
    def layer_grads(self) -> Sequence[Tensor]:
        """The gradient of the loss with respect to each call's output."""
        return self._run.grads[1]

    @_opened_once
    def constant(self) -> Tensor:
        """The loss's reduction constant ``c``."""
        return self.problem.loss.constant(self.outputs, self.targets)

    def pull(self, cotangents: Any) -> Params:
        """``J^T cotangents``: the cotangents are shaped like the outputs. About 0.7 gradients."""
        return self._run.pull(cotangents)

    def pull_layers(self, cotangents: Any) -> Sequence[Tensor]:
        """The cotangents pulled back to each call's output. About 0.3 gradients."""
        return self._run.pull_layers(cotangents)

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
            return [call.shape[0] == count for call in self.calls]
        inputs = tree.map(
            lambda x: x[:1] if isinstance(x, Tensor) and x.ndim and x.shape[0] == count else x,
            self.inputs,
        )
        params = _renamed(self.params)
        capture = Capture(params, lambda z: z, tuple(m[:1] for m in self.masks))
        with torch.no_grad(), capture:
            self.problem.forward(params, self._buffers, inputs)
        if len(capture.calls) != len(self.calls):
            return [False] * len(self.calls)
        return [
            whole.shape[0] == count and one.shape == (1, *whole.shape[1:])
            for whole, one in zip(self.calls, capture.calls, strict=True)
        ]

    def objective(self, params: Params) -> tuple[Tensor, Params]:
        """(loss, gradient) at another point: the same batch, buffers and dropout masks."""
        self._run.loss  # noqa: B018 - the masks are drawn by the first run
        if untransformed((params, self._buffers, self.inputs)):
            run = _GraphRun(self, params)
            return run.loss.detach(), run.grads[0]
        gradient, value = grad_and_value(lambda p: self._loss(p)[0])(params)
        return value, gradient

    def value(self, params: Params) -> Tensor:
        """The loss at another point: the same batch, buffers and dropout masks."""
        self._run.loss  # noqa: B018
        with torch.no_grad():
            return self._loss(params)[0]

    # -------------------------------------------------------------------------- second derivatives
    def hvp(self, vector: Params) -> Params:
        """The loss's Hessian times a vector. The first call opens the second-order graph."""
        return self._run.hvp(self, vector)

    def jvp(self, vector: Params) -> Any:
        """``J vector``, shaped like the outputs, with the masks and kernels of the forward run."""
        if vector is self._along and self._run.tangents is not None:
            return self._run.tangents
        return self._run.jvp(self, vector)

    def ggn_mv(self, vector: Params) -> Params:
        """The Gauss-Newton matrix ``J^T H_L J`` of the loss times a vector."""
        product = self.problem.loss.hessian_product(self.outputs, self.targets, self.jvp(vector))
        return self.pull(product)

    # ------------------------------------------------------------------------------------ internals
    def _refuse_coupling(self) -> None:
        if coupling := self.problem.couples_examples():
            msg = (
                f"per-example gradients are not defined: {coupling} couples the examples of a "
                "batch; put it in eval mode, or use GroupNorm"
            )
            raise ValueError(msg)

    def _forward(self, params: Params, tap: Callable | None) -> tuple[Any, Buffers, Capture]:
        capture = Capture(params, tap, self.masks, self._generator, self._twice)
        with capture:
            outputs, buffers = self.problem.forward(params, self._buffers, self.inputs)
        self.masks = tuple(capture.masks)
        return outputs, buffers, capture

    def _loss(self, params: Params) -> tuple[Tensor, Any]:
        outputs, buffers, _ = self._forward(params, None)
        return self.problem.loss(outputs, self.targets), (outputs, buffers)


class _GraphRun:
    """The run as an autograd graph on leaves of its own.

    It does not refer back to its evaluation: the graph is freed when the last user lets go, not
    when a garbage collector comes by.
    """

    def __init__(self, evaluation: Evaluation, params: Params | None = None):
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
        self.edges = []

        def tap(output):
            self.edges.append(get_gradient_edge(output))
            return output

        self.tangents = None
        along = evaluation._along if params is None else None
        with torch.enable_grad():
            if along is None:
                run = evaluation._forward(self.leaves, tap if taps else None)
            else:
                run, self.tangents = self._forward_along(evaluation, along)
            self.outputs, buffers, capture = run
            example_count(self.outputs)
            self.loss = evaluation.problem.loss(self.outputs, evaluation.targets)
        self.buffers = {k: b.detach() for k, b in buffers.items()}
        self.calls, self.unrecorded = capture.calls, capture.unrecorded
        self.layer_inputs = [x.detach() for x in capture.inputs]

    def _forward_along(self, evaluation, along):
        """The run, and the outputs' derivatives along a vector; None if an operation has no rule.

        First derivatives only: torch's faults with forward mode are in second ones.
        """
        generator = evaluation._generator
        before = None if generator is None else generator.get_state()
        try:
            with forward_ad.dual_level():
                duals = {k: forward_ad.make_dual(p, along[k]) for k, p in self.leaves.items()}
                outputs, buffers, capture = evaluation._forward(duals, None)
                pairs = tree.map(_unpack, outputs)
                primals = tree.map(lambda x: x.primal, pairs, is_leaf=_is_pair)
                tangents = tree.map(
                    lambda x: torch.zeros_like(x.primal) if x.tangent is None else x.tangent,
                    pairs,
                    is_leaf=_is_pair,
                )
                buffers = {k: forward_ad.unpack_dual(b).primal for k, b in buffers.items()}
            return (primals, buffers, capture), detach(tangents)
        except NotImplementedError:
            if generator is not None and before is not None:
                generator.set_state(before)
            return evaluation._forward(self.leaves, None), None

    @_opened_once
    def grads(self):
        inputs = [*self.leaves.values(), *self.edges]
        everything = self._gradient(self.loss, None, inputs, self._twice, self._keep)
        n = len(self.leaves)
        self._graph_of_grads = dict(zip(self.leaves, everything[:n], strict=True))
        grads = {k: g.detach() for k, g in self._graph_of_grads.items()}
        return grads, [g.detach() for g in everything[n:]]

    def pull(self, cotangents):
        return dict(zip(self.leaves, self._pull(cotangents, [*self.leaves.values()]), strict=True))

    def pull_layers(self, cotangents):
        return self._pull(cotangents, self.edges)

    def hvp(self, evaluation, vector):
        if not self._twice:
            msg = "products with the Hessian need twice=True, in the Evaluation or in the Need"
            raise RuntimeError(msg)
        self.grads  # noqa: B018 - opens the graph of the gradient
        return self._through(self._graph_of_grads, vector, self.leaves)

    def jvp(self, evaluation, vector):
        seed, pulled = self._transposed
        flat, spec = tree.flatten(self.outputs)
        result = self._through(pulled, vector, dict(enumerate(seed)))
        return tree.unflatten([result[i] for i in range(len(flat))], spec)

    @_opened_once
    def _transposed(self):
        """``u -> J^T u`` as a graph in ``u``: linear, so its own pull-back is ``J``."""
        seed = [torch.zeros_like(x, requires_grad=True) for x in tree.leaves(self.outputs)]
        pulled = self._pull(seed, [*self.leaves.values()], create_graph=True)
        return seed, dict(zip(self.leaves, pulled, strict=True))

    def _through(self, graph, vector, inputs):
        """The vector pulled back through a graph of gradients to its inputs."""
        alive = [k for k, g in graph.items() if g.requires_grad]
        if not alive:
            return {k: torch.zeros_like(x) for k, x in inputs.items()}
        values = self._gradient(
            [graph[k] for k in alive], [vector[k] for k in alive], [*inputs.values()]
        )
        return dict(zip(inputs, values, strict=True))

    def _pull(self, cotangents, inputs, create_graph=False):
        pairs = [
            (x, u)
            for x, u in zip(tree.leaves(self.outputs), tree.leaves(cotangents), strict=True)
            if x.requires_grad
        ]
        outputs = [x for x, _ in pairs]
        return self._gradient(outputs, [u for _, u in pairs], inputs, create_graph)

    def _gradient(self, outputs, cotangents, inputs, create_graph=False, keep=True):
        flat = [outputs] if isinstance(outputs, Tensor) else outputs
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if inputs and any(x.requires_grad for x in flat):
            found = torch.autograd.grad(
                outputs,
                inputs,
                cotangents,
                retain_graph=keep,
                create_graph=create_graph,
                allow_unused=True,
            )
        return [self._zero(x) if g is None else g for g, x in zip(found, inputs, strict=True)]

    def _zero(self, unreached):
        """The gradient with respect to what the outputs do not depend on."""
        if isinstance(unreached, Tensor):
            return torch.zeros_like(unreached)
        like = next(iter(self.leaves.values()))
        return like.new_zeros(self.calls[self.edges.index(unreached)].shape)


class _FunctionRun:
    """The run built from ``torch.func.vjp``, for use inside other transforms."""

    tangents = None

    def __init__(self, evaluation: Evaluation):
        self._hessian = self._jacobian = None
        self.calls: list[Call] = []
        self.unrecorded: dict[str, str] = {}
        if evaluation._taps:
            # Only the shapes of the layers' outputs are used; a compiler removes this run.
            with torch.no_grad():
                _, _, capture = evaluation._forward(_renamed(evaluation.params), lambda z: z)
            self.calls, self.unrecorded = capture.calls, capture.unrecorded
        like = next(iter(tree.leaves(evaluation.params)), torch.zeros(()))
        self._zeros = [like.new_zeros(()).expand(c.shape) for c in self.calls]
        calls = len(self.calls)

        def f(params, zeros):
            rest = iter(zeros)
            tap = (lambda z: z + next(rest)) if evaluation._taps else None
            outputs, buffers, capture = evaluation._forward(_renamed(params), tap)
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

    @_opened_once
    def grads(self):
        return self._vjp(self._loss_vjp(torch.ones_like(self.loss))[0])

    def pull(self, cotangents):
        return self._vjp(cotangents)[0]

    def pull_layers(self, cotangents):
        return self._vjp(cotangents)[1]

    def hvp(self, evaluation, vector):
        if self._hessian is None:
            self._hessian = vjp(grad(lambda p: evaluation._loss(p)[0]), evaluation.params)[1]
        return self._hessian(vector)[0]

    def jvp(self, evaluation, vector):
        if self._jacobian is None:
            # A pull-back of its own: the one with zeros would be transposed together with them.
            pull = vjp(lambda p: evaluation._forward(p, None)[0], evaluation.params)[1]
            zeros = tree.map(torch.zeros_like, self.outputs)
            self._jacobian = vjp(lambda u: pull(u)[0], zeros)[1]
        return self._jacobian(vector)[0]


def _unpack(x: Tensor) -> forward_ad.UnpackedDualTensor:
    return forward_ad.unpack_dual(x)


def _is_pair(x: Any) -> bool:
    return isinstance(x, forward_ad.UnpackedDualTensor)


def _renamed(params: Params) -> Params:
    """The same values as tensors made here, whose identities a compiler does not guard on."""
    return {k: p.view_as(p) for k, p in params.items()}


def untransformed(tensors: Any) -> bool:
    """Whether nothing watches: no compiler, no transform, no outer graph."""
    if torch.compiler.is_compiling():
        return False
    if tree.in_transform() or forward_ad._current_level >= 0:
        return False
    if not torch.is_grad_enabled():
        return True
    return not any(isinstance(x, Tensor) and x.requires_grad for x in tree.leaves(tensors))
