"""The quadratic form of the Gauss-Newton matrix on a few vectors."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.linalg import treemath
from funcprecond.need import Need
from funcprecond.tree import Params

__all__ = ["GGNForm"]


@dataclasses.dataclass(frozen=True)
class GGNForm(Need):
    """The function ``[v_1, ..., v_k] -> (k, k)`` with the entries ``v_iᵀ G v_j``, on this batch.

    Each vector is pushed forward to the outputs, where the Hessian of the loss is applied. No
    pull-back is needed, so that a vector costs about one gradient. Parameters that a vector leaves
    out count as zero. The function is valid for one step only.
    """

    twice: ClassVar[bool] = True

    def measure(self, evaluation: Evaluation, noise: Any) -> Callable[[Sequence[Params]], Tensor]:
        return functools.partial(_form, evaluation)


def _form(evaluation: Evaluation, vectors: Sequence[Params]) -> Tensor:
    pushed = [evaluation.jvp(treemath.fill(v, evaluation.params)) for v in vectors]
    curved = [evaluation.output_hessian_mv(u) for u in pushed]
    return torch.stack([torch.stack([_dot(u, c) for c in curved]) for u in pushed])


def _dot(x: Any, y: Any) -> Tensor:
    return treemath.dot(*({str(i): v for i, v in enumerate(tree.leaves(z))} for z in (x, y)))
