"""The loss and its gradient at other points of the batch that is being observed."""

import dataclasses
from typing import Any, ClassVar

from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.need import Need
from funcprecond.tree import Params

__all__ = ["Objective", "ObjectiveFunctions"]


class ObjectiveFunctions:
    """The loss, and its gradient, as functions on one batch, with the same dropout masks.

    They live for one step.
    """

    def __init__(self, evaluation: Evaluation):
        self._evaluation = evaluation

    def loss(self, params: Params) -> Tensor:
        """The loss at ``params``, a 0-d tensor; one forward run."""
        return self._evaluation.value(params)

    def gradient(self, params: Params) -> tuple[Tensor, Params]:
        """The loss and its gradient at ``params``."""
        return self._evaluation.objective(params)

    def loss_after(self, step: Params) -> Tensor:
        """The loss at ``params + step``, for a step that may leave out parameters."""
        return self.loss(self.moved(step))

    def gradient_after(self, step: Params) -> tuple[Tensor, Params]:
        """The loss and its gradient at ``params + step``."""
        return self.gradient(self.moved(step))

    def moved(self, step: Params) -> Params:
        """``params + step``, in the parameters' dtypes; those that the step leaves out stay."""
        params = self._evaluation.params
        return {**params, **{k: (params[k] + s).to(params[k].dtype) for k, s in step.items()}}


@dataclasses.dataclass(frozen=True)
class Objective(Need):
    """The objective as functions of the parameters, :class:`ObjectiveFunctions`."""

    gives: ClassVar[type] = ObjectiveFunctions

    def measure(self, evaluation: Evaluation, noise: Any) -> ObjectiveFunctions:
        return ObjectiveFunctions(evaluation)
