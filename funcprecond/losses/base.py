"""What the curvature code asks of a loss, and the loss that any callable becomes."""

import abc
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad, vjp

from funcprecond import tree
from funcprecond.tracing import is_eager

__all__ = [
    "Custom",
    "Labels",
    "Loss",
    "Reduction",
    "check_labels",
    "entries",
    "one_term",
    "same_shape",
]

Reduction = Literal["mean", "sum"]
Labels = Literal["mc", "empirical", "exact"]


class Loss(abc.ABC):
    """What the curvature code asks of a loss; see :mod:`funcprecond.losses` for the convention."""

    @abc.abstractmethod
    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """The loss, a 0-d tensor."""

    @abc.abstractmethod
    def constant(self, outputs: Any, targets: Any) -> Tensor:
        """The reduction constant ``c``, a 0-d tensor."""

    def empirical(self, outputs: Any, targets: Any) -> Any:
        """The terms' gradient at the data's labels: the loss's cotangent divided by ``c``."""
        gradient = _gradient(lambda f: self(f, targets), outputs, targets)
        constant = self.constant(outputs, targets)
        return tree.map(lambda g: g / constant.to(g.dtype), gradient)

    def hessian_product(self, outputs: Any, targets: Any, vector: Any) -> Any:
        """The Hessian in the outputs times a vector, ``c`` included.

        It is what makes the Gauss-Newton matrix; a likelihood whose Hessian is indefinite gives the
        expected one, its Fisher information.
        """
        return vjp(grad(lambda f: self(f, targets)), outputs)[1](vector)[0]

    def label_noise(self, targets: Any, samples: int, generator: torch.Generator | None) -> Tensor:
        """The random numbers that ``samples`` sampled labels for each term take."""
        raise _no_likelihood(self)

    def sampled(self, outputs: Any, targets: Any, noise: Tensor) -> Tensor:
        """(samples, *outputs.shape): cotangents at labels sampled from the model's prediction.

        Each carries ``1 / sqrt(samples)``, so that the sum of the outer products of their
        pull-backs is an unbiased Fisher matrix whatever the number of samples.
        """
        raise _no_likelihood(self)

    def exact(self, outputs: Any, targets: Any) -> Iterator[Tensor]:
        """Cotangents whose pull-backs' outer products sum to the exact Fisher matrix.

        One for each output entry of an example: terms of one example may meet in a layer's
        position, so they cannot share a pull-back.
        """
        raise _no_likelihood(self)


def _no_likelihood(loss: Loss) -> TypeError:
    return TypeError(
        f"{loss!r} does not know its likelihood, so labels cannot be sampled from it and it has no "
        "exact Fisher matrix: use another of fp.losses, or labels='empirical'"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Custom(Loss):
    """Any callable ``(outputs, targets) -> 0-d tensor``.

    Attributes:
        function: the loss.
        reduction: how it combines the examples: "mean" (the default) or "sum". The empirical Fisher
            matrix cannot be scaled without knowing.
    """

    function: Callable[[Any, Any], Tensor]
    reduction: Reduction = "mean"

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        value = self.function(outputs, targets)
        if not isinstance(value, Tensor) or value.ndim:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            msg = f"the loss must return a 0-d tensor, not {found}: take its mean or sum"
            raise ValueError(msg)
        return value

    def constant(self, outputs: Any, targets: Any) -> Tensor:
        first = tree.leaves(outputs)[0]
        count = first.shape[0] if self.reduction == "mean" else 1
        return first.new_full((), 1 / max(count, 1))


def _gradient(loss: Callable[[Any], Tensor], outputs: Any, targets: Any) -> Any:
    flat, spec = tree.flatten(outputs)
    if not is_eager((flat, targets)):
        return grad(loss)(outputs)
    # torch.func has no rule for some kernels, such as CTC's with lengths in tuples.
    flat = [f.detach().requires_grad_() for f in flat]
    with torch.enable_grad():
        value = loss(tree.unflatten(flat, spec))
    if not value.requires_grad:
        return tree.map(torch.zeros_like, outputs)
    return tree.unflatten(torch.autograd.grad(value, flat, materialize_grads=True), spec)


def entries(outputs: Tensor, reduction: Reduction) -> int:
    """How many terms a mean over all entries divides by; 1 for a sum."""
    return max(outputs.numel(), 1) if reduction == "mean" else 1


def one_term(shape: torch.Size, like: Tensor) -> Iterator[Tensor]:
    """For each entry of an example, a (1, *shape) mask that is 1 there."""
    count = math.prod(shape)
    for term in torch.eye(count, dtype=like.dtype, device=like.device):
        yield term.reshape(1, *shape)


def check_labels(labels: Labels, samples: int) -> None:
    """Raise ValueError unless both are known."""
    if labels not in ("mc", "empirical", "exact") or samples < 1:
        msg = (
            "labels must be 'mc', 'empirical' or 'exact' and samples at least 1, "
            f"not {labels!r}, {samples}"
        )
        raise ValueError(msg)


def same_shape(name: str, outputs: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless the shapes agree."""
    if outputs.shape != targets.shape:
        msg = (
            f"{name}: outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} must agree"
        )
        raise ValueError(msg)
