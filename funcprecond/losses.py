r"""Losses that know their likelihood.

A loss is :math:`L = c \sum_n \sum_r \omega_{nr}\, \ell(f_{nr}, y_{nr})`: a *reduction constant*
``c`` times weighted terms, one or more for each of the N examples (axis 0 of the outputs).
Curvature needs more than its value: how a label is sampled from the model's own prediction, a
square root of the terms' Hessian in the outputs, and ``c`` itself, so that every curvature matrix
has the scale of the loss as the user computes it. The losses here have all three in closed form.
Any other callable ``(outputs, targets) -> 0-d tensor`` becomes a :class:`Custom` loss: gradient,
Hessian, Gauss-Newton product and empirical Fisher work, sampling raises a sentence.

*Cotangents* below are gradients with respect to the outputs of the terms without ``c``, shaped like
the outputs: pulled back through the model, they give rows whose outer products, summed and
multiplied by ``c``, are the curvature matrix.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vjp

from funcprecond import random, tree

__all__ = [
    "MSE",
    "BCEWithLogits",
    "CrossEntropy",
    "Custom",
    "Loss",
    "as_loss",
    "bce_with_logits",
    "cross_entropy",
    "mse",
]

Reduction = Literal["mean", "sum"]


class Loss(abc.ABC):
    """What the curvature code asks of a loss; see the module's docstring for the convention."""

    @abc.abstractmethod
    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """The loss, a 0-d tensor."""

    @abc.abstractmethod
    def constant(self, outputs: Any, targets: Any) -> Tensor:
        """The reduction constant ``c``, a 0-d tensor."""

    def empirical(self, outputs: Any, targets: Any) -> Any:
        """The terms' gradient at the data's labels: the loss's cotangent divided by ``c``."""
        gradient = grad(lambda f: self(f, targets))(outputs)
        constant = self.constant(outputs, targets)
        return tree.map(lambda g: g / constant.to(g.dtype), gradient)

    def hessian_product(self, outputs: Any, targets: Any, vector: Any) -> Any:
        """``(d2 L / d outputs2) vector``, ``c`` included."""
        return vjp(grad(lambda f: self(f, targets)), outputs)[1](vector)[0]

    def draw(self, targets: Any, samples: int, generator: torch.Generator | None) -> Tensor:
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
        "exact Fisher matrix: use fp.losses.cross_entropy, mse or bce_with_logits, or "
        "labels='empirical'"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class CrossEntropy(Loss):
    """Softmax cross-entropy: outputs (..., C) are logits, targets (...) class indices.

    Targets may also be probabilities, shaped like the outputs.

    Attributes:
        ignore_index: terms with this target count neither in the sum nor in the mean.
        label_smoothing: in [0, 1), mixes the target with the uniform distribution.
        weight: (C,), a weight for each class, or None.
        reduction: "mean" over the kept terms (weighted, as torch does) or "sum".
        class_dim: the classes' axis of the outputs; -1 here, 1 in ``torch.nn.CrossEntropyLoss``.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    weight: Tensor | None = None
    reduction: Reduction = "mean"
    class_dim: int = -1

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self._check(outputs, targets)
        logits = outputs.movedim(self.class_dim, -1)
        labels = targets
        if targets.is_floating_point():
            labels = targets.movedim(self.class_dim, -1).reshape(-1, logits.shape[-1])
        else:
            labels = targets.reshape(-1)
        return F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            labels,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )

    def constant(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.reduction == "sum":
            return outputs.new_ones(())
        if targets.is_floating_point():
            return outputs.new_ones(()) / (outputs.numel() // outputs.shape[self.class_dim])
        kept = (targets != self.ignore_index).to(outputs.dtype)
        if self.weight is not None:
            kept = kept * self.weight.to(outputs)[self._labels(targets)]
        return 1 / kept.sum()

    def hessian_product(self, outputs: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        p, u = self._probabilities(outputs), vector.movedim(self.class_dim, -1)
        weight = self._term_weights(outputs, targets) * self.constant(outputs, targets)
        product = weight * (p * u - p * (p * u).sum(-1, keepdim=True))
        return product.movedim(-1, self.class_dim)

    def draw(self, targets: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
        shape = targets.shape
        if targets.is_floating_point():
            shape = targets.movedim(self.class_dim, -1).shape[:-1]
        return random.uniform(
            (samples, *shape), generator, dtype=torch.float32, device=targets.device
        )

    def sampled(self, outputs: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        p = self._probabilities(outputs)
        # Inverse CDF; the last class takes what rounding leaves of the unit interval.
        below = (p.cumsum(-1)[..., :-1] <= noise.to(p.dtype).unsqueeze(-1)).sum(-1)
        onehot = torch.arange(p.shape[-1], device=p.device) == below.unsqueeze(-1)
        scale = (self._term_weights(outputs, targets) / noise.shape[0]).sqrt()
        return (scale * (p - onehot.to(p.dtype))).movedim(-1, self._stacked_class_dim(outputs))

    def exact(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        p = self._probabilities(outputs)
        scale = self._term_weights(outputs, targets).sqrt()
        classes = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
        for term in _one_term(p.shape[1:-1], p):
            for c in range(p.shape[-1]):
                column = scale * p[..., c : c + 1].sqrt() * (classes[c] - p)
                yield (column * term.unsqueeze(-1)).movedim(-1, self.class_dim)

    def _stacked_class_dim(self, outputs: Tensor) -> int:
        return self.class_dim if self.class_dim < 0 else self.class_dim + 1

    def _probabilities(self, outputs: Tensor) -> Tensor:
        return outputs.movedim(self.class_dim, -1).softmax(-1)

    def _labels(self, targets: Tensor) -> Tensor:
        return torch.where(targets == self.ignore_index, 0, targets)

    def _term_weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(..., 1): the weight of each term's Hessian ``diag(p) - p p^T``."""
        if targets.is_floating_point():
            labels = targets.movedim(self.class_dim, -1).to(outputs.dtype)
            smooth, classes = self.label_smoothing, labels.shape[-1]
            labels = (1 - smooth) * labels + smooth / classes
            if self.weight is not None:
                labels = labels * self.weight.to(outputs)
            return labels.sum(-1, keepdim=True)
        kept = (targets != self.ignore_index).to(outputs.dtype)
        if self.weight is not None:
            weight = self.weight.to(outputs)
            own = weight[self._labels(targets)]
            kept = kept * ((1 - self.label_smoothing) * own + self.label_smoothing * weight.mean())
        return kept.unsqueeze(-1)

    def _check(self, outputs: Tensor, targets: Tensor) -> None:
        terms = list(outputs.movedim(self.class_dim, -1).shape[:-1])
        expected = list(outputs.shape) if targets.is_floating_point() else terms
        if list(targets.shape) != expected:
            msg = (
                f"cross_entropy: outputs {tuple(outputs.shape)} with classes on axis "
                f"{self.class_dim} expect targets {tuple(expected)}, not {tuple(targets.shape)}; "
                "for torch's layout (N, C, ...) use fp.losses.CrossEntropy(class_dim=1)"
            )
            raise ValueError(msg)


@dataclasses.dataclass(frozen=True, eq=False)
class MSE(Loss):
    """Squared error, ``(outputs - targets)^2``, averaged or summed over all entries, as torch does.

    As a likelihood: a Gaussian of unit variance, ``c = 2 / numel`` for the mean and 2 for the sum.
    """

    reduction: Reduction = "mean"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        _same_shape("mse", outputs, targets)
        error = (outputs - targets).square()
        return error.mean() if self.reduction == "mean" else error.sum()

    def constant(self, outputs: Tensor, targets: Tensor) -> Tensor:
        count = outputs.numel() if self.reduction == "mean" else 1
        return outputs.new_full((), 2 / max(count, 1))

    def hessian_product(self, outputs: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        return self.constant(outputs, targets) * vector

    def draw(self, targets: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
        shape = (samples, *targets.shape)
        return random.normal(shape, generator, dtype=targets.dtype, device=targets.device)

    def sampled(self, outputs: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        return noise.to(outputs.dtype) / math.sqrt(noise.shape[0])

    def exact(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        for term in _one_term(outputs.shape[1:], outputs):
            yield term.expand_as(outputs)


@dataclasses.dataclass(frozen=True, eq=False)
class BCEWithLogits(Loss):
    """Binary cross-entropy of logits, averaged or summed over all entries, as torch does.

    Attributes:
        pos_weight: a weight of the positive class, broadcast against the outputs, or None.
        reduction: "mean" or "sum", over all entries.
    """

    pos_weight: Tensor | None = None
    reduction: Reduction = "mean"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        _same_shape("bce_with_logits", outputs, targets)
        return F.binary_cross_entropy_with_logits(
            outputs, targets, pos_weight=self.pos_weight, reduction=self.reduction
        )

    def constant(self, outputs: Tensor, targets: Tensor) -> Tensor:
        count = outputs.numel() if self.reduction == "mean" else 1
        return outputs.new_full((), 1 / max(count, 1))

    def hessian_product(self, outputs: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        return self.constant(outputs, targets) * self._curvature(outputs, targets) * vector

    def draw(self, targets: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
        shape = (samples, *targets.shape)
        return random.uniform(shape, generator, dtype=torch.float32, device=targets.device)

    def sampled(self, outputs: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        q = outputs.sigmoid()
        scale = (self._weights(outputs, targets) / noise.shape[0]).sqrt()
        return scale * (q - (noise.to(q.dtype) < q).to(q.dtype))

    def exact(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        root = self._curvature(outputs, targets).sqrt()
        for term in _one_term(outputs.shape[1:], outputs):
            yield root * term

    def _weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.pos_weight is None:
            return torch.ones_like(outputs)
        return 1 + (self.pos_weight.to(outputs) - 1) * targets

    def _curvature(self, outputs: Tensor, targets: Tensor) -> Tensor:
        q = outputs.sigmoid()
        return self._weights(outputs, targets) * q * (1 - q)


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
        return self.function(outputs, targets)

    def constant(self, outputs: Any, targets: Any) -> Tensor:
        first = tree.leaves(outputs)[0]
        count = first.shape[0] if self.reduction == "mean" else 1
        return first.new_full((), 1 / max(count, 1))


cross_entropy = CrossEntropy()
mse = MSE()
bce_with_logits = BCEWithLogits()


def as_loss(loss: Any) -> Loss:
    """The :class:`Loss` for what a user passes: ours, torch's own losses, or any callable.

    Raises:
        TypeError: ``loss`` is not callable.
        ValueError: a torch loss has an option whose curvature is not defined here.
    """
    if isinstance(loss, Loss):
        return loss
    if loss is F.cross_entropy:
        return CrossEntropy(class_dim=1)
    if loss is F.mse_loss:
        return mse
    if loss is F.binary_cross_entropy_with_logits:
        return bce_with_logits
    if isinstance(loss, (nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss)):
        if loss.reduction not in ("mean", "sum"):
            msg = f"{loss} has reduction={loss.reduction!r}: training needs 'mean' or 'sum'"
            raise ValueError(msg)
        reduction: Any = loss.reduction
        if isinstance(loss, nn.CrossEntropyLoss):
            return CrossEntropy(
                loss.ignore_index, loss.label_smoothing, loss.weight, reduction, class_dim=1
            )
        if isinstance(loss, nn.MSELoss):
            return MSE(reduction)
        if loss.weight is None:
            return BCEWithLogits(loss.pos_weight, reduction)
    if not callable(loss):
        msg = f"the loss must be callable as loss(outputs, targets), not a {type(loss).__name__}"
        raise TypeError(msg)
    return Custom(loss)  # pyright: ignore[reportArgumentType]


def _one_term(shape: torch.Size, like: Tensor) -> Iterator[Tensor]:
    """For each entry of an example, a (1, *shape) mask that is 1 there."""
    count = math.prod(shape)
    for term in torch.eye(count, dtype=like.dtype, device=like.device):
        yield term.reshape(1, *shape)


def _same_shape(name: str, outputs: Tensor, targets: Tensor) -> None:
    if outputs.shape != targets.shape:
        msg = (
            f"{name}: outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} must agree"
        )
        raise ValueError(msg)
