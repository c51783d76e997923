"""Forward runs that are differentiated by ``torch.func.vjp``, under transforms and compilers."""

from typing import Any

import torch
from torch.func import grad, vjp

from funcprecond import tree
from funcprecond.autodiff.once import opened_once, renamed
from funcprecond.layers.layer_call import LayerCall
from funcprecond.problems import example_count

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
            # Only the shapes of the layers' outputs are used, so a compiler removes this run.
            with torch.no_grad():
                _, _, recorder = evaluation._forward(renamed(evaluation.params), lambda z: z)
            self.calls, self.unrecorded = recorder.calls, recorder.unrecorded
        like = next(iter(tree.leaves(evaluation.params)), torch.zeros(()))
        self._zeros = [like.new_zeros(()).expand(c.shape) for c in self.calls]
        calls = len(self.calls)

        def f(params, zeros):
            rest = iter(zeros)
            tap = (lambda z: z + next(rest)) if evaluation._layers else None
            outputs, buffers, recorder = evaluation._forward(renamed(params), tap)
            if len(recorder.calls) != calls:
                # Without this check, a call that is missing here would get a gradient of zero.
                msg = (
                    f"one run of the model made {calls} calls of layers and another made "
                    f"{len(recorder.calls)}: write the model so that every run makes the same calls"
                )
                raise RuntimeError(msg)
            return outputs, (buffers, recorder.inputs)

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
            # This is a separate pull-back, because ``self._vjp`` also pulls back to the zeros.
            pull = vjp(lambda p: evaluation._forward(p, None)[0], evaluation.params)[1]
            zeros = tree.map(torch.zeros_like, self.outputs)
            self._jacobian = vjp(lambda u: pull(u)[0], zeros)[1]
        return self._jacobian(vector)[0]


class ForwardRun:
    """A forward run without derivatives: its outputs, and the inputs of its layers."""

    def __init__(self, evaluation: Any):
        params = renamed(evaluation.params)
        self.outputs, self.buffers, recorder = evaluation._forward(params, lambda z: z)
        self.calls, self.unrecorded = recorder.calls, recorder.unrecorded
        self.layer_inputs = recorder.inputs
