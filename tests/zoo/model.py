"""What a line of the zoo is: a model, its loss and a batch, and the same loss in plain torch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcprecond as fp

EXAMPLES, TOKENS, WORDS, CLASSES, PIXELS = 3, 4, 7, 3, 32


@dataclasses.dataclass
class Model:
    """One model, as a user would bring it.

    Attributes:
        model: a module, or a function ``(params, inputs) -> outputs``.
        batch: the pair of inputs and targets, whose examples are on axis 0.
        loss: what a user would pass to :func:`fp.problem`.
        terms: the sum of the loss's terms in plain torch; the loss is this sum times a constant.
        outputs: what the loss takes from the model's outputs, as for :func:`fp.problem`.
        params: the initial parameters of a function.
        in_axes: as for :func:`fp.problem`. None means the nodes of one graph.
        shared: the positions or names of the inputs that belong to all examples.
        refused: a part of the sentence with which a check, or a method, refuses this model.
        diagonal: patterns of the parameters for which K-FAC keeps only a diagonal.
        smooth: whether the model has the derivatives that finite differences see.
        wide: whether the model runs in float64.
        tolerance: the relative error of what autograd computes, for models that round inside.
    """

    model: Any
    batch: tuple[Any, Any]
    loss: Any
    terms: Callable[[Any, Any], Tensor]
    outputs: str | Callable[[Any], Any] | None = None
    params: dict[str, Tensor] | None = None
    in_axes: Any = "auto"
    shared: tuple[int | str, ...] = ()
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    diagonal: tuple[str, ...] = ()
    smooth: bool = True
    wide: bool = True
    tolerance: float = 1e-8

    def problem(self) -> fp.Problem:
        """The problem that a user would make of it."""
        return fp.problem(
            self.model,
            self.loss,
            outputs=self.outputs,
            params=self.params,
            in_axes=self.in_axes,
        )


ZOO: dict[str, tuple[str, Callable[[], Model]]] = {}
"""By name: the package that a model needs, and what builds it."""


def zoo(name: str, package: str = "torch") -> Callable[[Callable[[], Model]], Callable[[], Model]]:
    """Decorate the builder of a model."""

    def enter(build: Callable[[], Model]) -> Callable[[], Model]:
        ZOO[name] = package, build
        return build

    return enter


# --------------------------------------------------------------------------------------- the losses
def class_terms(outputs: Tensor, targets: Tensor) -> Tensor:
    """The sum over all targets that are not -100, for classes on the last axis."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="sum")


def square_terms(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the sum of squares: the loss is the mean of squares, whose constant c is 2 / entries."""
    return 0.5 * (outputs - targets).square().sum()


def classifier(model: Any, inputs: Any, classes: int = CLASSES, **options: Any) -> Model:
    """A model of one class an example."""
    targets = torch.arange(EXAMPLES) % classes
    return Model(model, (inputs, targets), fp.losses.cross_entropy, class_terms, **options)


def images(model: nn.Module, pixels: int = PIXELS, **options: Any) -> Model:
    """A classifier of images. A BatchNorm couples the examples of a training step."""
    norms = (nn.modules.batchnorm._BatchNorm,)
    if any(isinstance(layer, norms) for layer in model.modules()):
        options = {"refused": {"smw_ng": "per-sample gradients are not defined"}, **options}
    return classifier(model, torch.randn(EXAMPLES, 3, pixels, pixels), **options)


def language_model(model: nn.Module, inputs: Any, ids: Tensor, **options: Any) -> Model:
    """A model of the next token, where the last position has no target."""
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    return Model(model, (inputs, targets), fp.losses.cross_entropy, class_terms, **options)


def tokens() -> Tensor:
    """(EXAMPLES, TOKENS) ids, none of them 0, which is the padding of most models."""
    return torch.randint(1, WORDS, (EXAMPLES, TOKENS))
