"""The loss and its gradient at other parameters, on the batch that is being observed."""

import dataclasses
from typing import Any, ClassVar

from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.need import Need
from funcprecond.tree import Params

__all__ = ["Objective", "ObjectiveFunctions"]


class ObjectiveFunctions:
    """The loss and its gradient as functions of the parameters, on one batch.

    All calls use the same dropout masks. The functions are valid for one step only.
    """

    def __init__(self, evaluation: Evaluation):
        self._evaluation = evaluation

    def loss(self, params: Params) -> Tensor:
        """The loss at given parameters.

        Args:
            params: the parameters.

        Returns:
            A 0-d tensor. Costs one forward run.
        """
        return self._evaluation.value(params)

    def gradient(self, params: Params) -> tuple[Tensor, Params]:
        """The loss and its gradient at given parameters.

        Args:
            params: the parameters.

        Returns:
            The loss, a 0-d tensor, and the gradient, shaped like ``params``. Costs one gradient.
        """
        return self._evaluation.objective(params)

    def loss_after(self, step: Params) -> Tensor:
        """The loss after a step from the observed parameters.

        Args:
            step: shaped like the parameters, of which it may leave out some; these do not change.

        Returns:
            A 0-d tensor. Costs one forward run.
        """
        return self.loss(self.moved(step))

    def gradient_after(self, step: Params) -> tuple[Tensor, Params]:
        """The loss and its gradient after a step from the observed parameters.

        Args:
            step: see :meth:`loss_after`.

        Returns:
            The loss, a 0-d tensor, and the gradient, shaped like the parameters. Costs one
            gradient.
        """
        return self.gradient(self.moved(step))

    def moved(self, step: Params) -> Params:
        """The parameters after a step from the observed parameters.

        Args:
            step: see :meth:`loss_after`.

        Returns:
            ``params + step``, in the dtypes of the parameters.
        """
        params = self._evaluation.params
        return {**params, **{k: (params[k] + s).to(params[k].dtype) for k, s in step.items()}}


@dataclasses.dataclass(frozen=True)
class Objective(Need):
    """The loss and its gradient as functions of the parameters.

    The measured value is an :class:`ObjectiveFunctions`. The measurement itself costs nothing.
    """

    gives: ClassVar[type] = ObjectiveFunctions

    def measure(self, evaluation: Evaluation, noise: Any) -> ObjectiveFunctions:
        return ObjectiveFunctions(evaluation)
