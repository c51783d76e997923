"""The interface of losses, and the loss for any other callable."""

import abc
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.func import grad, vjp

from funcprecond import tree
from funcprecond.linalg.precision import factor_dtype
from funcprecond.tracing import is_eager

__all__ = [
    "INSIDE",
    "Custom",
    "Labels",
    "Loss",
    "Reduction",
    "check_labels",
    "check_reduction",
    "check_tensors",
    "entries",
    "matched",
    "one_term",
    "require_examples",
]

# What to do where the loss is inside of the model.
INSIDE = (
    "the loss is computed inside of the model, so that nothing is known of its examples and its "
    "predictions: it has a gradient and a Hessian, but neither a Gauss-Newton or Fisher matrix nor "
    "per-sample gradients. Choose the predictions and compute the loss outside, "
    "fp.problem(model, fp.losses.cross_entropy, outputs='logits'), where the targets of a language "
    "model are fp.losses.next_tokens(input_ids)"
)

Reduction = Literal["mean", "sum"]
Labels = Literal["mc", "empirical", "exact"]


class Loss(abc.ABC):
    """The interface of a loss; see :mod:`funcprecond.losses` for its form and its constant ``c``.

    To add a loss, implement :meth:`__call__` and :meth:`constant`, and for a loss with a likelihood
    also :meth:`label_noise`, :meth:`sampled` and :meth:`exact`.

    Attributes:
        squares: whether the loss is ``c / 2`` times a sum of squared errors, so that
            :meth:`empirical` returns the errors.
        at_samples: whether the loss is an estimate at samples that depend on the parameters, so
            that only its value and its gradient at these parameters are known.
    """

    squares: ClassVar[bool] = False
    at_samples: ClassVar[bool] = False

    @property
    def is_sum(self) -> bool:
        """Whether the loss of several batches is the sum of their losses.

        Otherwise it is their mean, in which each batch has the weight ``1 / c``.
        """
        return getattr(self, "reduction", "mean") == "sum"

    @abc.abstractmethod
    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Compute the loss.

        Args:
            outputs: the outputs of the model, with the examples on axis 0.
            targets: the targets.

        Returns:
            A 0-d tensor.
        """

    @abc.abstractmethod
    def constant(self, outputs: Any, targets: Any) -> Tensor:
        """Compute the reduction constant ``c``.

        Args:
            outputs, targets: see :meth:`__call__`.

        Returns:
            A 0-d tensor, in float32 or wider. It is infinite if no term counts, as where all
            targets are ignored.
        """

    def empirical(self, outputs: Any, targets: Any) -> Any:
        """Compute the cotangent at the labels of the data: the gradient of the loss over ``c``.

        Args:
            outputs, targets: see :meth:`__call__`.

        Returns:
            Shaped like the outputs.
        """
        gradients = _gradient(lambda f: self(f, targets), outputs, targets)
        constant = self.constant(outputs, targets)
        return tree.with_floating(outputs, [(g / constant).to(g.dtype) for g in gradients])

    def hessian_product(self, outputs: Any, targets: Any, vector: Any) -> Any:
        """Multiply the Hessian of the loss in the outputs, including ``c``, by a vector.

        The Gauss-Newton matrix is made of this Hessian. If the Hessian of a likelihood is
        indefinite, then its expectation is used, which is the Fisher information.

        Args:
            outputs, targets: see :meth:`__call__`.
            vector: shaped like the outputs.

        Returns:
            Shaped like the outputs.
        """

        def loss(floating: list[Tensor]) -> Tensor:
            return self(tree.with_floating(outputs, floating), targets)

        pull = vjp(grad(loss), tree.floating(outputs))[1]
        return tree.with_floating(outputs, pull(tree.floating(vector))[0])

    def label_noise(self, targets: Any, samples: int, generator: torch.Generator | None) -> Tensor:
        """Draw the random numbers from which labels are sampled.

        Args:
            targets: the targets, whose shape is used.
            samples: the number of sampled labels per term.
            generator: the source of randomness.

        Returns:
            The random numbers, with ``samples`` on axis 0.

        Raises:
            TypeError: the likelihood of the loss is not known.
            ValueError: there is no generator.
        """
        raise _no_likelihood(self)

    def sampled(self, outputs: Any, targets: Any, noise: Tensor) -> Tensor:
        """Compute the cotangents at labels that are sampled from the prediction of the model.

        Each cotangent includes a factor ``1 / sqrt(samples)``. So the sum of the outer products of
        their pull-backs, times ``c``, is an unbiased estimate of the Fisher matrix for any number
        of samples.

        Args:
            outputs, targets: see :meth:`__call__`.
            noise: the random numbers from :meth:`label_noise`.

        Returns:
            (samples, *outputs.shape).

        Raises:
            TypeError: the likelihood of the loss is not known.
        """
        raise _no_likelihood(self)

    def exact(self, outputs: Any, targets: Any) -> Iterator[Tensor]:
        """Compute cotangents for the exact Fisher matrix.

        The sum of the outer products of their pull-backs, times ``c``, is the matrix. There is one
        cotangent per entry of the output of an example. The terms of an example cannot share a
        pull-back, because it would add their gradients.

        Args:
            outputs, targets: see :meth:`__call__`.

        Returns:
            The cotangents, one after another, each shaped like the outputs.

        Raises:
            TypeError: the likelihood of the loss is not known.
        """
        raise _no_likelihood(self)


def _no_likelihood(loss: Loss) -> TypeError:
    return TypeError(
        f"the likelihood of {loss!r} is not known, so labels cannot be sampled from it and it has "
        "no exact Fisher matrix: use another loss of fp.losses, or labels='empirical'. If the "
        "model computes its own loss, choose its predictions with fp.problem(..., outputs='logits')"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Custom(Loss):
    """Any callable ``(outputs, targets) -> 0-d tensor`` as a loss.

    The value alone does not tell how the loss combines its terms, so this is assumed: every example
    has one term, and the loss is their mean. It is true of a mean over all entries, too, as long as
    the examples of all batches have equally many. Gradients, products and matrices of a single
    batch do not depend on it, except for the scale of the empirical Fisher matrix. Whatever
    combines batches or examples does: matrices over several batches, :func:`funcprecond.accumulate`
    and :func:`funcprecond.gradient_noise_scale`. So if the callable returns a sum, say so with
    ``reduction``; if it ignores some targets, or weights them, say so with ``divisor``.

    Attributes:
        function: the callable.
        reduction: how the callable combines its terms: "mean" (the default) or "sum".
        divisor: a function ``(outputs, targets) -> number``: the number by which a mean divides the
            sum of its terms, such as the number of targets that are not ignored. None means the
            number of examples.

    Example:
        >>> import torch, funcprecond as fp
        >>> def masked(outputs, targets):
        ...     kept = targets != 0
        ...     return ((outputs - targets).abs() * kept).sum() / kept.sum()
        >>> loss = fp.losses.Custom(masked, divisor=lambda outputs, targets: (targets != 0).sum())
        >>> outputs, targets = torch.ones(2, 3), torch.tensor([[3.0, 0.0, 0.0], [2.0, 0.0, 4.0]])
        >>> loss(outputs, targets), loss.constant(outputs, targets)
        (tensor(2.), tensor(0.3333))
    """

    function: Callable[[Any, Any], Tensor]
    reduction: Reduction = "mean"
    divisor: Callable[[Any, Any], Tensor | float] | None = dataclasses.field(
        default=None, repr=False
    )

    def __post_init__(self):
        check_reduction(self.reduction)
        if self.divisor is not None and self.reduction == "sum":
            msg = "a sum divides by nothing: pass divisor with reduction='mean' only"
            raise ValueError(msg)

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        value = self.function(outputs, targets)
        if not isinstance(value, Tensor) or value.ndim:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            msg = f"the loss must return a 0-d tensor, not {found}: take its mean or sum"
            raise ValueError(msg)
        return value

    def constant(self, outputs: Any, targets: Any) -> Tensor:
        first = require_examples(outputs)
        one = first.new_ones((), dtype=factor_dtype(first))
        if self.reduction == "sum":
            return one
        return one / (self.divisor(outputs, targets) if self.divisor else max(first.shape[0], 1))


def _gradient(loss: Callable[[Any], Tensor], outputs: Any, targets: Any) -> Sequence[Tensor]:
    """The gradient of the loss in each floating-point leaf of the outputs."""
    flat = tree.floating(outputs)
    if not is_eager((flat, targets)):
        return grad(lambda flat: loss(tree.with_floating(outputs, flat)))(flat)
    # torch.func has no rule for some kernels, such as that of CTC with lengths in tuples.
    flat = [f.detach().requires_grad_() for f in flat]
    with torch.enable_grad():
        value = loss(tree.with_floating(outputs, flat))
    if not value.requires_grad:
        return [torch.zeros_like(x) for x in flat]
    return torch.autograd.grad(value, flat, materialize_grads=True)


def require_examples(outputs: Any) -> Tensor:
    """Return the first floating-point leaf of the outputs with an axis.

    Raises:
        TypeError: there is none, as where the outputs are the loss itself.
    """
    for x in tree.floating(outputs):
        if x.ndim:
            return x
    raise TypeError(INSIDE)


def entries(outputs: Tensor, targets: Tensor, reduction: Reduction, value: float = 1) -> Tensor:
    """The constant of a loss with a term for each entry of the targets: ``value / numel``.

    For a sum it is ``value``. The dtype is that of the outputs, but at least float32.
    """
    count = max(targets.numel(), 1) if reduction == "mean" else 1
    return outputs.new_full((), value / count, dtype=factor_dtype(outputs))


def one_term(shape: torch.Size, like: Tensor) -> Iterator[Tensor]:
    """Yield for each entry of an example a (1, *shape) tensor that is 1 there and 0 elsewhere."""
    count = math.prod(shape)
    for term in torch.eye(count, dtype=like.dtype, device=like.device):
        yield term.reshape(1, *shape)


def check_labels(labels: Labels, samples: int) -> None:
    """Raise ValueError unless ``labels`` is a known value and ``samples`` is at least 1."""
    if labels not in ("mc", "empirical", "exact") or samples < 1:
        msg = (
            "labels must be 'mc', 'empirical' or 'exact' and samples at least 1, not "
            f"{labels!r} and {samples}"
        )
        raise ValueError(msg)


def check_reduction(reduction: Any) -> None:
    """Raise ValueError unless ``reduction`` is "mean" or "sum"."""
    if reduction not in ("mean", "sum"):
        msg = f"reduction must be 'mean' or 'sum', not {reduction!r}"
        raise ValueError(msg)


def check_tensors(name: str, outputs: Any, targets: Any) -> None:
    """Raise TypeError unless the outputs and the targets are tensors."""
    for what, x in (("outputs", outputs), ("targets", targets)):
        if not isinstance(x, Tensor):
            msg = (
                f"{name}: the {what} must be one tensor, not a {type(x).__name__}: return or pass "
                "a tensor, choose one with fp.problem(..., outputs='logits'), or pass fp.problem a "
                "function (outputs, targets) -> loss that takes what it needs from them"
            )
            raise TypeError(msg)


def matched(name: str, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Check that the shapes agree, and return both tensors in one floating-point dtype.

    Integers and booleans, such as counts and labels 0 and 1, become at least float32, in which
    they are exact up to 2^24.

    Raises:
        TypeError: one of the two is not a tensor.
        ValueError: the shapes do not agree.
    """
    check_tensors(name, outputs, targets)
    if outputs.shape != targets.shape:
        msg = (
            f"{name}: the shapes of outputs {tuple(outputs.shape)} and targets "
            f"{tuple(targets.shape)} must agree"
        )
        raise ValueError(msg)
    if outputs.dtype == targets.dtype:
        return outputs, targets
    dtype = torch.promote_types(outputs.dtype, targets.dtype)
    if not targets.is_floating_point():
        dtype = factor_dtype(outputs)
    return outputs.to(dtype), targets.to(dtype)
