"""Forward runs that are differentiated by ``torch.func.vjp``, under transforms and compilers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vjp

from funcprecond import tree
from funcprecond.autodiff.once import opened_once, renamed
from funcprecond.autodiff.recorder import Recorder
from funcprecond.layers.layer_call import LayerCall
from funcprecond.problems import check_outputs

__all__ = ["ForwardRun", "FunctionRun"]


class FunctionRun:
    """A forward run built from ``torch.func.vjp``, for use under transforms and compilers.

    Its methods implement those of :class:`funcprecond.autodiff.evaluation.Evaluation`.
    """

    def __init__(self, evaluation: Any):
        self._hessian = self._jacobian = None
        self.calls: list[LayerCall] = []
        self.unrecorded: dict[str, str] = {}
        if evaluation._layers:
            recorder, hidden = _recorded(evaluation)
            self.calls, self.unrecorded = recorder.calls, hidden | recorder.unrecorded
        like = next(iter(tree.leaves(evaluation.params)), torch.zeros(()))
        self._zeros = [like.new_zeros(()).expand(c.shape) for c in self.calls]
        calls = len(self.calls)

        def f(params, zeros):
            rest = iter(zeros)
            tap = (lambda z: z + next(rest).to(z.dtype)) if evaluation._layers else None
            outputs, buffers, recorder = evaluation._forward(renamed(params), tap)
            if len(recorder.calls) != calls:
                # Without this check, a call that is missing here would get a gradient of zero.
                msg = (
                    f"one run of the model made {calls} calls of layers and another made "
                    f"{len(recorder.calls)}: write the model so that every run makes the same calls"
                )
                raise RuntimeError(msg)
            check_outputs(outputs)
            whole.append(outputs)
            return tree.floating(outputs), (buffers, recorder.inputs, _others(outputs))

        whole: list[Any] = []
        found, self._vjp, (self.buffers, self.layer_inputs, others) = vjp(  # pyright: ignore
            f, evaluation.params, self._zeros, has_aux=True
        )
        self.outputs = _rebuilt(whole[0], found, others)
        self.loss, self._loss_vjp = vjp(  # pyright: ignore
            lambda x: evaluation.problem.loss(
                tree.with_floating(self.outputs, x), evaluation.targets
            ),
            found,
        )

    @opened_once
    def grads(self):
        return self._vjp(self._loss_vjp(torch.ones_like(self.loss))[0])

    # What is computed for parameters that are not chosen is removed by a compiler.
    def pull(self, cotangents, keep, names=None):
        found = self._vjp(tree.floating(cotangents))[0]
        return found if names is None else {k: found[k] for k in names}

    def pull_layers(self, cotangents, keep, chosen=None):
        return self._vjp(tree.floating(cotangents))[1]

    def hvp(self, evaluation, vector, keep):
        if self._hessian is None:
            self._hessian = vjp(grad(lambda p: evaluation._loss(p)[0]), evaluation.params)[1]
        return self._hessian(vector)[0]

    def jvp(self, evaluation, vector, keep):
        if self._jacobian is None:
            # This is a separate pull-back, because ``self._vjp`` also pulls back to the zeros.
            pull = vjp(lambda p: tree.floating(evaluation._forward(p, None)[0]), evaluation.params)[
                1
            ]
            zeros = [torch.zeros_like(x) for x in tree.floating(self.outputs)]
            self._jacobian = vjp(lambda u: pull(u)[0], zeros)[1]
        return tree.with_floating(self.outputs, self._jacobian(vector)[0])


def _recorded(evaluation: Any) -> tuple[Recorder, dict[str, str]]:
    """Run the model once to see its layers.

    The recorded calls get their parameters without a graph, so that the outputs require a gradient
    only if there are uses that were not recorded. Only this and the shapes of the layers' outputs
    are used, so that a compiler removes the run.

    Returns:
        The recorder, and the parameters with other uses.
    """

    def depends_on(names: Iterable[str]) -> tuple[Recorder, bool]:
        chosen = {k: evaluation.params[k] for k in names}
        recorders, found = [], []

        def f(chosen):
            params = renamed({**evaluation.params, **chosen})
            outputs, _, recorder = evaluation._forward(params, lambda z: z, detached=True)
            recorders.append(recorder)
            leaves = tree.floating(outputs)
            found.append(any(x.requires_grad for x in leaves))
            return [x.detach() for x in leaves]

        vjp(f, chosen)
        return recorders[0], found[0]

    recorder, depends = depends_on(evaluation.params)
    rest = [k for k in evaluation.params if k not in recorder.unrecorded]
    if not depends or not rest or not depends_on(rest)[1]:
        return recorder, {}
    hidden = [k for k in rest if depends_on([k])[1]]
    return recorder, dict.fromkeys(hidden, "a function that cannot be intercepted")


def _others(outputs: Any) -> list[Tensor]:
    """The tensors among the outputs that have no derivative, such as counts."""
    leaves = [outputs] if isinstance(outputs, Tensor) else tree.leaves(outputs)
    return [x for x in leaves if isinstance(x, Tensor) and not _is_own(x)]


def _rebuilt(outputs: Any, floating: list[Tensor], others: list[Tensor]) -> Any:
    """The outputs of a run inside of a transform, with the tensors that left the transform."""
    if isinstance(outputs, Tensor):
        return floating[0]
    rest = iter(others)
    found = tree.map(
        lambda x: next(rest) if isinstance(x, Tensor) and not _is_own(x) else x, outputs
    )
    return tree.with_floating(found, floating)


def _is_own(x: Tensor) -> bool:
    """Whether a leaf of the outputs is one that :func:`funcprecond.tree.floating` lists."""
    return bool(tree.floating(x))


class ForwardRun:
    """A forward run without derivatives: its outputs, and the inputs of its layers."""

    def __init__(self, evaluation: Any):
        params = renamed(evaluation.params)
        self.outputs, self.buffers, recorder = evaluation._forward(params, lambda z: z)
        self.calls, self.unrecorded = recorder.calls, recorder.unrecorded
        self.layer_inputs = recorder.inputs
