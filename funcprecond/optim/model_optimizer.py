"""Methods that need more of a batch than its gradient, as a ``torch.optim.Optimizer``."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.autodiff.examples import Examples
from funcprecond.autodiff.graph_check import no_checkpoints, nodes
from funcprecond.autodiff.origin import recorded
from funcprecond.autodiff.part import Part
from funcprecond.curvature.hessian import HessianOperator, HessianProbes
from funcprecond.curvature.layer_statistics import ExampleRows, LayerStatistics
from funcprecond.curvature.objective import Objective
from funcprecond.curvature.sampled_gradient import SampledGradient
from funcprecond.curvature.sketch import Sketch
from funcprecond.evidence import Evidence, MissingEvidence
from funcprecond.losses import as_loss
from funcprecond.need import Need, is_mark
from funcprecond.optim.closure import ClosureEvaluation, ClosureProblem
from funcprecond.optim.micro_batches import whole
from funcprecond.optim.optimizer import MethodOptimizer
from funcprecond.optim.watch import Measured, Watcher
from funcprecond.solver.layer_gradient import GRADIENT_ROWS
from funcprecond.tree import Params

__all__ = ["ModelOptimizer", "is_watchable"]


class ModelOptimizer(MethodOptimizer):
    """A method that measures the model, behind the interface of ``torch.optim``.

    Attributes:
        model: the module that is trained.
    """

    def __init__(
        self, model: nn.Module, loss: Any, params: Any, seed: int, options: dict[str, Any]
    ):
        if not isinstance(model, nn.Module):
            msg = (
                f"{type(self).__name__} needs the layers of the model, and got a "
                f"{type(model).__name__}: pass the nn.Module itself, and groups of parameters as "
                "params="
            )
            raise TypeError(msg)
        self.model = model
        self._loss, self._given = (None if loss is None else as_loss(loss)), loss
        self._generator = torch.Generator().manual_seed(seed)
        self._forget()
        super().__init__(model.parameters() if params is None else params, options)

    def _forget(self) -> None:
        self._watcher: Watcher | ClosureProblem | None = None
        self._pending: list[Measured] = []
        self._places: dict[tuple, Examples] = {}
        self._evaluation: tuple[Evaluation, ClosureProblem] | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See :meth:`MethodOptimizer.add_param_group`; the parameters must be those of the model.

        Args:
            param_group: the parameters and their options.

        Raises:
            TypeError, ValueError: see :meth:`MethodOptimizer.add_param_group`.
        """
        super().add_param_group(param_group)
        names = self._names()
        foreign = [i for i, p in enumerate(param_group["params"]) if id(p) not in names]
        if foreign:
            self.param_groups.pop()
            msg = (
                f"parameter {foreign[0]} of the group is not one of the model, in which "
                f"{type(self).__name__} measures it: pass a module that contains all of them"
            )
            raise ValueError(msg)

    def _names(self) -> dict[int, str]:
        return {id(p): k for k, p in self.model.named_parameters()}

    # -------------------------------------------------------------------------------- measurements
    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Compute the loss that the optimizer was made with, so that it is seen.

        Args:
            outputs: the outputs of the model.
            targets: the targets.

        Returns:
            The loss, a 0-d tensor.

        Raises:
            RuntimeError: the optimizer was made without a loss.
        """
        if self._loss is None:
            msg = "the optimizer was made without a loss: pass it as loss= when you make it"
            raise RuntimeError(msg)
        value = self._loss(outputs, targets)
        self._report(outputs, targets, value)
        return value

    def _report(self, outputs: Any, targets: Any, value: Tensor) -> None:
        """Tell whoever records the current run that the optimizer's own loss was computed."""
        assert self._loss is not None
        if self._watcher is not None:
            self._watcher.computed(self._loss, outputs, targets, value)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Record the layers and the loss of the forward pass in a ``with`` block.

        The block contains the forward pass of one batch or micro-batch and its loss, computed by a
        loss function or loss module of torch, by the model itself, or by :meth:`loss`. The backward
        pass may be inside or behind it. The measurements of all blocks between two steps count as
        those of one batch with all their examples; what runs outside of a block counts in the
        gradient only. At a step without a measurement, the block costs nothing. Otherwise it keeps
        the inputs and output gradients of the layers until the step.

        Yields:
            None.

        Raises:
            RuntimeError: no loss, or more than one, was computed in the block; the run cannot be
                observed; or several processes train the model.

        Example:
            >>> import torch, funcprecond as fp
            >>> model, criterion = torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss()
            >>> opt = fp.optim.KFAC(model, lr=0.03)
            >>> inputs, targets = torch.ones(8, 4), torch.zeros(8, dtype=torch.int64)
            >>> with opt.watch():
            ...     loss = criterion(model(inputs), targets)
            >>> loss.backward()
            >>> opt.step()
        """
        if self._watcher is not None:
            # A closure that step() watches may have a watch of its own.
            yield
            return
        needs = self._due()
        if unwatched := [n for n in needs if not is_watchable(n)]:
            msg = (
                f"{type(self).__name__} needs {unwatched[0]}, for which the model must be "
                "evaluated again: take the step with opt.step(closure), where closure() computes "
                "the loss of the batch and returns it"
            )
            raise RuntimeError(msg)
        if all(p.grad is None for group in self.param_groups for p in group["params"]):
            # The gradients of these runs are gone, so that their measurements must go too.
            self._pending = [m for m in self._pending if m.factor is None]
        if not needs or not torch.is_grad_enabled():
            yield
            return
        self._check_alone()
        names = self._names()
        params = {names[id(p)]: p for p in self._trainable()}
        own = self._loss is not None
        watcher = Watcher(params, needs, self._generator, self._places, own)
        # A compiled model runs eagerly here, because its layers are not seen otherwise.
        eager = torch.compiler.set_stance("force_eager")
        with self._recorded_by(watcher), no_checkpoints(), eager, watcher:
            yield
        if watcher.measured is not None:
            self._pending.append(watcher.measured)
        elif watcher.edges:
            raise self._no_loss(watcher.unknown)

    def _check_alone(self) -> None:
        dist = torch.distributed
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            msg = (
                f"{type(self).__name__} measures the examples of its own process, and the steps of "
                "several processes would differ: train in one process, or with a method that needs "
                "only the gradient"
            )
            raise RuntimeError(msg)

    @contextlib.contextmanager
    def _recorded_by(self, watcher: Watcher | ClosureProblem) -> Iterator[None]:
        """Report the optimizer's own loss to a watcher, also where it is a module."""
        self._watcher, handle = watcher, None

        def computed(_: nn.Module, args: tuple, kwargs: dict[str, Any], value: Tensor) -> None:
            outputs, targets = (*args, *kwargs.values())
            self._report(outputs, targets, value)

        if isinstance(self._given, nn.Module):
            handle = self._given.register_forward_hook(computed, with_kwargs=True)
        try:
            yield
        finally:
            self._watcher = None
            if handle is not None:
                handle.remove()

    def _no_loss(self, unknown: Sequence[str]) -> RuntimeError:
        seen = f" ({', '.join(dict.fromkeys(unknown))} was called)" if unknown else ""
        return RuntimeError(
            f"no loss with a known likelihood was computed in the watch{seen}: compute "
            "F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits or another one of "
            "fp.losses with reduction='mean' inside the block, or pass your own as loss= to the "
            "optimizer and call it as opt.loss(outputs, targets)"
        )

    def _trainable(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _due(self) -> tuple[Need, ...]:
        """What is to be measured for the next step."""
        wanted: dict[Need, None] = {}
        for group in self.param_groups:
            transform = self._transform(group)
            own = (
                self.state[p].get("piece") if p in self.state else None
                for p in group["params"]
                if p.requires_grad
            )
            steps = {0 if piece is None else piece.step for piece in own}
            wanted |= dict.fromkeys(n for t in sorted(steps) for n in transform.needs(t))
        return _real(tuple(wanted))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and the measurements of runs whose gradients these were.

        Args:
            set_to_none: see :meth:`torch.optim.Optimizer.zero_grad`.
        """
        super().zero_grad(set_to_none)
        self._pending = [m for m in self._pending if m.factor is None]

    # ---------------------------------------------------------------------------------------- steps
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, and write it into the parameters.

        A parameter whose ``.grad`` is None sits out this step, see :meth:`MethodOptimizer.step`.

        Args:
            closure: a function that computes the loss of a batch and returns it, and may also call
                ``backward``. The method may call it several times. It may be left out if the
                forward pass was watched, see :meth:`watch`, or nothing is to be measured.

        Returns:
            The loss that the closure returned first, or None without a closure.

        Raises:
            MissingEvidence: a measurement is due, and the forward pass was not watched.
            RuntimeError: a gradient is sparse, or the closure cannot be observed.
            ValueError: an option in a group is out of range.
        """
        needs = self._due()
        if closure is not None and not all(map(is_watchable, needs)):
            return self._step_by_closure(closure, needs)
        loss = None if closure is None else self._watched(closure)
        with torch.no_grad():
            self._step()
        self._pending.clear()
        return loss

    def _watched(self, closure: Callable[[], Any]) -> Any:
        """Call a closure, watch its forward pass, and go backward if it does not."""
        calls = _Backwards()
        with (
            torch.enable_grad(),
            contextlib.nullcontext() if self._pending else self.watch(),
            calls,
        ):
            loss = closure()
        if isinstance(loss, Tensor):
            if not calls.count and loss.requires_grad:
                super().zero_grad()
                loss.backward()
            loss = loss.detach()
        return loss

    def _step_by_closure(self, closure: Callable[[], Any], needs: Sequence[Need]) -> Any:
        self._check_alone()
        names = self._names()
        params = {names[id(p)]: p for p in self._trainable()}
        by_outputs = not all(isinstance(n, _OF_THE_LOSS) for n in needs)
        before = {k: p.grad for k, p in params.items()}
        run = ClosureProblem(closure, self.model, params, by_outputs, self._loss is not None)
        try:
            with self._recorded_by(run), torch.compiler.set_stance("force_eager"):
                evaluation = ClosureEvaluation(
                    run.problem,
                    {k: p.detach() for k, p in params.items()},
                    (None, None),
                    generator=self._generator,
                    layers=any(n.layers for n in needs),
                    twice=any(n.twice for n in needs),
                )
                own, reached = evaluation.grads, _reached(evaluation)
                for k, p in params.items():
                    given = p.grad if run.called_backward else own[k] if k in reached else None
                    # The evaluation's own tensor tells the method that nobody changed the gradient.
                    p.grad = given if given is None or run.is_changed(p) else own[k]
                self._evaluation = evaluation, run
                with torch.no_grad():
                    self._step()
        finally:
            self._evaluation = None
            for k, p in params.items():
                p.grad = p.grad if run.called_backward else before[k]
        return run.returned

    def _evidence(self, needs: tuple[Need, ...], params: Params, grads: Params) -> Evidence:
        real = _real(needs)
        if self._evaluation is not None:
            return self._evaluated(*self._evaluation, needs, params, grads)
        # What was not differentiated has no part in the gradient.
        pending = [m for m in self._pending if m.factor is not None]
        if missing := [n for n in real if not pending or any(n not in m.values for m in pending)]:
            if not is_watchable(missing[0]):
                raise self._unmeasured(missing)
            msg = (
                f"{type(self).__name__} measures {missing[0]} at this step, and the forward pass "
                "was not watched, or its loss was not differentiated: write `with opt.watch(): "
                "loss = ...` around the forward pass and the loss of each batch, and call "
                "loss.backward(), or take the step with opt.step(closure)"
            )
            raise MissingEvidence(msg)
        every: Params = {k: p.detach() for k, p in self.model.named_parameters()}
        evidence = super()._evidence(tuple(n for n in needs if is_mark(n)), params, grads)
        return evidence.part({**evidence.measured, **{n: whole(pending, n, every) for n in real}})

    def _unmeasured(self, needs: Sequence[Need]) -> RuntimeError:
        return RuntimeError(
            f"{type(self).__name__} needs {needs[0]} at this step, for which the batch must be "
            "evaluated again: take the step with opt.step(closure), where closure() computes the "
            "loss of the batch and returns it"
        )

    def _evaluated(
        self,
        evaluation: Evaluation,
        run: ClosureProblem,
        needs: tuple[Need, ...],
        params: Params,
        grads: Params,
    ) -> Evidence:
        """The evidence for one piece from the evaluation of a closure."""
        every = evaluation.params.keys() == params.keys()
        part: Any = evaluation if every else Part(evaluation, list(params))

        def measured(need: Need) -> Any:
            noise = need.draw(run.problem, part.params, (None, run.targets), self._generator)
            return need.measure(part, noise)

        with torch.enable_grad():
            values = {n: measured(n) for n in needs}
        own = {k: evaluation.grads[k] for k in params}
        outputs = evaluation.outputs
        whole_run = evaluation.params, evaluation.loss, outputs, own, {}, values, recorded(own)
        return Evidence(*whole_run)

    # ---------------------------------------------------------------------------- saving and copies
    def __getstate__(self) -> dict[str, Any]:
        own = {"model": self.model, "_loss": self._loss, "_given": self._given}
        return {**super().__getstate__(), **own, "_generator": self._generator.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        seeded = state.get("_generator")
        if isinstance(seeded, Tensor):
            state = {**state, "_generator": torch.Generator().set_state(seeded)}
        super().__setstate__(state)
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`MethodOptimizer.state_dict`; the state of the random numbers is included.

        Returns:
            The dict.
        """
        return {**super().state_dict(), "generator": self._generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :meth:`MethodOptimizer.load_state_dict`.

        Args:
            state_dict: the dict.

        Raises:
            ValueError, KeyError: it belongs to other parameters, or to another method.
        """
        super().load_state_dict(state_dict)
        if "generator" in state_dict:
            # A loader may have moved it to a device with everything else.
            self._generator.set_state(state_dict["generator"].cpu())


# What depends on the loss as a function of the parameters, and not on the outputs of the model.
_OF_THE_LOSS = (HessianProbes, HessianOperator, Objective)


def _real(needs: Sequence[Need]) -> tuple[Need, ...]:
    """The needs that are measured. The rows of a gradient that anybody may change are of no use."""
    return tuple(n for n in needs if not is_mark(n) and n != GRADIENT_ROWS)


def is_watchable(need: Need) -> bool:
    """Whether one forward run of somebody else's gives the measurement.

    Args:
        need: the need. A mark, for which nothing is measured, is watchable.
    """
    if is_mark(need):
        return True
    return isinstance(need, (LayerStatistics, SampledGradient, Sketch)) and not isinstance(
        need, ExampleRows
    )


def _reached(evaluation: Evaluation) -> set[str]:
    """The names of the parameters that the loss depends on."""
    run = evaluation._run
    seen = {*nodes([run.loss])}
    with torch.enable_grad():
        ends = {
            k: x.grad_fn or x.view_as(x).grad_fn.next_functions[0][0] for k, x in run.leaves.items()
        }
    return {k for k, node in ends.items() if node in seen}


class _Backwards(TorchFunctionMode):
    """Counts the calls of ``Tensor.backward``."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is Tensor.backward
        return func(*args, **(kwargs or {}))
