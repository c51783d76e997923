"""The weight of a batch in the loss of several batches."""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.need import Need
from funcprecond.tree import state, static

__all__ = ["BatchWeight", "Weight"]


@state
class Weight:
    """How the loss of a batch enters that of several batches.

    Attributes:
        value: for a mean loss ``1 / c``, where c is the reduction constant of the loss: the number
            or the weight of the batch's terms. For a summed loss 1. A 0-d tensor.
        is_sum: whether the loss of several batches is the sum of their losses. Otherwise it is
            their mean with these weights.
    """

    value: Tensor
    is_sum: bool = static()


@dataclasses.dataclass(frozen=True)
class BatchWeight(Need):
    """The weight of the batch among others.

    The measured value is a :class:`Weight`. It costs nothing beside the gradient.
    """

    differentiates: ClassVar[bool] = False
    gives: ClassVar[type] = Weight

    def measure(self, evaluation: Evaluation, noise: Any) -> Weight:
        constant, is_sum = evaluation.constant, evaluation.problem.loss.is_sum
        return Weight(torch.ones_like(constant) if is_sum else 1 / constant, is_sum)
