"""The evaluation of a batch by a closure, as torch's own L-BFGS takes one.

The closure runs the model on one batch and returns the loss. Here it becomes a
:class:`funcprecond.Problem`: the parameters of the module are replaced for the time of a run, so
that the library can differentiate twice, push vectors forward, and evaluate the batch elsewhere.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from funcprecond import tree
from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.autodiff.examples import Examples
from funcprecond.autodiff.once import opened_once
from funcprecond.losses import Loss
from funcprecond.optim.losses import RECOGNISED, recognised
from funcprecond.optim.places import find_by_gradients
from funcprecond.problems import Problem
from funcprecond.tracing import unseen_by_modes
from funcprecond.tree import Buffers, Params

__all__ = ["ClosureEvaluation", "ClosureProblem"]


class ClosureProblem:
    """A closure as a problem.

    Args:
        closure: a function without arguments that returns the loss.
        model: the module whose parameters the closure uses.
        params: these parameters by name.
        by_outputs: whether the outputs of the model and the targets are needed, so that the loss
            must be one that is recognised. Otherwise the loss itself counts as the only output.
        own_loss: whether only :meth:`computed` reports a loss, and no torch function is recognised.

    Attributes:
        problem: the problem. Its batch is ``(None, None)``.
        returned: what the closure returned in the first run.
        called_backward: whether the closure called ``backward`` in the first run. The gradient is
            then in the ``.grad`` of the parameters.
    """

    def __init__(
        self,
        closure: Callable[[], Any],
        model: nn.Module,
        params: Mapping[str, Tensor],
        by_outputs: bool,
        own_loss: bool = False,
    ):
        self._closure, self._model, self._params = closure, model, dict(params)
        self._by_outputs, self._own_loss = by_outputs, own_loss
        self._seen: tuple[Loss, Any, Any, Tensor] | None = None
        self._written: dict[int, tuple[Tensor, int]] = {}
        self.returned: Any = None
        self.called_backward = False
        self._runs = 0
        values = {k: p.detach() for k, p in params.items()}
        self._loss = _Reported(self) if by_outputs else _Value()
        self.problem = Problem(self._forward, self._loss, values, {}, lambda batch: batch)

    def is_changed(self, p: Tensor) -> bool:
        """Whether the gradient of a parameter is another one than that of the closure's loss."""
        if self.called_backward and p.grad is not None:
            written, version = self._written.get(id(p), (None, -1))
            return written is None or p.grad is not written or written._version != version
        return False

    @property
    def targets(self) -> Any:
        """The targets that the loss was computed with."""
        return None if self._seen is None else self._seen[2]

    def computed(self, loss: Loss, outputs: Any, targets: Any, value: Tensor) -> None:
        """Note a loss that the closure computes.

        Args:
            loss: the loss.
            outputs, targets: its arguments.
            value: its value.

        Raises:
            RuntimeError: this is the second loss of the run.
        """
        if self._seen is not None and self._by_outputs:
            msg = (
                "the closure computes two losses, and how they are combined is not known: pass a "
                "loss that combines both as loss= to the optimizer, and call it as "
                "opt.loss(outputs, targets)"
            )
            raise RuntimeError(msg)
        self._seen = loss, outputs, targets, value

    def _forward(self, params: Params, buffers: Buffers, inputs: Any) -> tuple[Any, Buffers]:
        self._seen, first = None, not self._runs
        self._runs += 1
        mode = _Capture(self, self._leaves(params) if first else {})
        kept = contextlib.nullcontext() if first else _gradients_aside(self._params.values())
        places = _replaced(self._model, self._params, params, keep_buffers=first)
        with kept, places, mode, torch.enable_grad():
            returned = self._closure()
        # A trainer's closure goes backward from the loss itself, and returns a copy of it.
        value = torch.stack(mode.values).sum() if mode.values[1:] else [*mode.values, returned][0]
        if first:
            self.returned = returned.detach() if isinstance(returned, Tensor) else returned
            self.called_backward = mode.backwards > 0
            self._written = mode.written
        if not isinstance(value, Tensor) or value.ndim:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            msg = f"the closure must return the loss, a 0-d tensor, not {found}"
            raise TypeError(msg)
        if first and not value.requires_grad:
            msg = (
                "the loss that the closure returns does not depend on the parameters: return the "
                "loss itself and not a number or a detached copy, and leave gradients switched on"
            )
            raise RuntimeError(msg)
        if not self._by_outputs:
            return value.reshape(1), buffers
        if self._seen is None:
            msg = (
                "the closure computes no loss that is known here, and the method needs the outputs "
                f"and targets: use one of {', '.join(f.__name__ for f in RECOGNISED)}, or pass "
                "your own as loss= to the optimizer and call it as opt.loss(outputs, targets)"
            )
            raise RuntimeError(msg)
        if not torch.equal(self._seen[3].detach(), value.detach()):
            msg = (
                "the closure returns, or goes backward from, something else than the loss that it "
                "computes, such as a sum with a penalty or a multiple, so that the outputs do not "
                "determine it: return that loss (weight_decay= is a penalty), or pass your own as "
                "loss= to the optimizer and call it as opt.loss(outputs, targets)"
            )
            raise RuntimeError(msg)
        return self._seen[1], buffers

    def _leaves(self, params: Params) -> dict[str, tuple[Tensor, Tensor]]:
        """For each parameter, what stands for it in a run, and the parameter itself."""
        return {k: (params[k], p) for k, p in self._params.items()}


class ClosureEvaluation(Evaluation):
    """The evaluation of a :class:`ClosureProblem`, whose examples cannot be run one by one."""

    @opened_once
    def examples(self) -> Examples:
        """See :class:`funcprecond.Evaluation`."""
        return find_by_gradients(self._run)

    def pull_each(
        self, cotangents: Any, names: Sequence[str], chunk_size: int | None = None
    ) -> Params:
        """See :class:`funcprecond.Evaluation`; one pull-back for each example."""
        self.examples.require_apart()
        count, rows = self.examples.count, []
        for n in range(count):
            alone = []
            for u, place in zip(tree.floating(cotangents), self.examples.outputs, strict=True):
                weights = u.new_zeros(count)
                weights[n] = 1
                alone.append(u if place is None else place.spread(weights, u))
            rows.append(self.pull(tree.with_floating(cotangents, alone), True, names))
        return {k: torch.stack([row[k] for row in rows]) for k in names}


class _Reported(Loss):
    """The loss that the closure computed last, with its own targets."""

    def __init__(self, owner: ClosureProblem):
        self._owner = owner

    @property
    def _known(self) -> Loss:
        assert self._owner._seen is not None
        return self._owner._seen[0]

    @property
    def is_sum(self) -> bool:
        return self._known.is_sum

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        return self._known(outputs, self._owner.targets)

    def constant(self, outputs: Any, targets: Any) -> Tensor:
        return self._known.constant(outputs, self._owner.targets)

    def empirical(self, outputs: Any, targets: Any) -> Any:
        return self._known.empirical(outputs, self._owner.targets)

    def hessian_product(self, outputs: Any, targets: Any, vector: Any) -> Any:
        return self._known.hessian_product(outputs, self._owner.targets, vector)

    def label_noise(self, targets: Any, samples: int, generator: Any) -> Tensor:
        return self._known.label_noise(self._owner.targets, samples, generator)

    def sampled(self, outputs: Any, targets: Any, noise: Tensor) -> Tensor:
        return self._known.sampled(outputs, self._owner.targets, noise)

    def exact(self, outputs: Any, targets: Any) -> Iterator[Tensor]:
        return self._known.exact(outputs, self._owner.targets)


class _Value(Loss):
    """The loss of a model whose only output is its loss."""

    def __call__(self, outputs: Tensor, targets: Any) -> Tensor:
        return outputs.squeeze(0)

    def constant(self, outputs: Tensor, targets: Any) -> Tensor:
        return outputs.new_ones(())


_GRAD: Any = Tensor.grad
_OF_GRADIENTS = {Tensor.backward, _GRAD.__get__, _GRAD.__set__}


class _Capture(TorchFunctionMode):
    """Recognises the loss in a closure, and takes the gradient where the closure calls backward.

    Args:
        owner: gets the loss.
        leaves: what stands for the parameters in this run, and the parameters, whose ``.grad`` is
            written; empty in runs whose gradient nobody will ask for.
    """

    def __init__(self, owner: ClosureProblem, leaves: Mapping[str, tuple[Tensor, Tensor]]):
        super().__init__()
        self._owner, self._leaves = owner, leaves
        self.backwards = 0
        # What was differentiated.
        self.values: list[Tensor] = []
        # The gradients by the identity of their parameters, and how often they had been written to.
        self.written: dict[int, tuple[Tensor, int]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _OF_GRADIENTS:
            # The recorder would take them for uses of the parameters.
            with unseen_by_modes():
                run = self._backward if func is Tensor.backward else func
                return run(*args, **kwargs)
        out = func(*args, **kwargs)
        if not self._owner._own_loss and (found := recognised(func, args, kwargs)):
            self._owner.computed(*found, out)
        return out

    def _backward(self, value, gradient=None, retain_graph=None, create_graph=False, inputs=None):
        self.backwards += 1
        if value.requires_grad and not value.ndim:
            self.values.append(value if gradient is None else value * gradient)
        pairs = [pair for pair in self._leaves.values() if pair[0].requires_grad]
        if not pairs or not value.requires_grad:
            return
        # The graph is kept, because the method will ask it for more than this gradient.
        found = torch.autograd.grad(
            value, [x for x, _ in pairs], gradient, retain_graph=True, allow_unused=True
        )
        for (stand_in, p), g in zip(pairs, found, strict=True):
            if g is not None:
                before = p.grad
                p.grad = g.detach() if before is None else before + g.detach()
                # The closure may clip the gradients of model.parameters(), which are the stand-ins.
                stand_in.grad = p.grad
                self.written[id(p)] = p.grad, p.grad._version if before is None else -1


@contextlib.contextmanager
def _gradients_aside(params: Iterable[Tensor]) -> Iterator[None]:
    """Keep the gradients of parameters from a closure that sets them to zero, or clips them."""
    kept = [(p, p.grad) for p in params]
    for p, _ in kept:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in kept:
            p.grad = grad


@contextlib.contextmanager
def _replaced(
    model: nn.Module, named: Mapping[str, Tensor], values: Params, keep_buffers: bool
) -> Iterator[None]:
    """Put other tensors in the places of the parameters of a module, for the time of a run.

    Args:
        model: the module.
        named: its parameters by name.
        values: the tensors that take their places.
        keep_buffers: whether what the run writes into the buffers of the module stays there.
    """
    name_of = {id(p): k for k, p in named.items()}
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    flat: list[tuple[Any, list[Any]]] = []
    try:
        for part in model.modules():
            for key, p in part._parameters.items():
                if id(p) in name_of:
                    replaced.append((part._parameters, key, p))
                    part._parameters[key] = values[name_of[id(p)]]  # pyright: ignore
            if isinstance(part, nn.RNNBase):
                # A recurrent layer keeps a list of its weights.
                own: Any = part._flat_weights
                flat.append((part, own))
                part._flat_weights = [values.get(name_of.get(id(x), ""), x) for x in own]
            for key, b in () if keep_buffers else part._buffers.items():
                if b is not None:
                    replaced.append((part._buffers, key, b))
                    part._buffers[key] = b.clone()
        yield
    finally:
        for held, key, x in replaced:
            held[key] = x
        for part, weights in flat:
            part._flat_weights = weights
