"""The loss and its gradient at other points of the batch that is being observed."""

import dataclasses
from typing import Any

from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.need import Need
from funcprecond.tree import Params

__all__ = ["Objective", "ObjectiveFunctions"]


class ObjectiveFunctions:
    """The loss, and its gradient, as functions: the same batch, the same dropout masks."""

    def __init__(self, evaluation: Evaluation):
        self._evaluation = evaluation

    def loss(self, params: Params) -> Tensor:
        """The loss at ``params``, a 0-d tensor; one forward run."""
        return self._evaluation.value(params)

    def gradient(self, params: Params) -> tuple[Tensor, Params]:
        """The loss and its gradient at ``params``."""
        return self._evaluation.objective(params)


@dataclasses.dataclass(frozen=True)
class Objective(Need):
    """The objective as functions of the parameters. They live for one step."""

    def measure(self, evaluation: Evaluation, noise: Any) -> ObjectiveFunctions:
        return ObjectiveFunctions(evaluation)
