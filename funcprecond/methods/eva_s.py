"""Eva-s: Shampoo with one vector for each axis of a parameter."""

import functools
import math

import torch
from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.linalg.precision import factor_dtype
from funcprecond.methods.card import card
from funcprecond.representation.average import Average, Decay, check_decay
from funcprecond.transform import Transform, fitted, gradient_only, shapes_of
from funcprecond.tree import Params, state, static

__all__ = ["EvaSState", "eva_s"]


@state
class EvaSState:
    """The state of Eva-s.

    Attributes:
        vectors: for each parameter with several axes, the mean of the gradient along all axes but
            one, for each axis, accumulated over the steps.
        shapes: the names and the shapes of the parameters.
    """

    vectors: Average
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = static()


@card(
    "Eva-s (Zhang 2023)",
    curvature="F̂_emp^batch",
    representation="layer, rank-one KF-dim",
    solver="G direct, Sherman-Morrison",
    learning_rate=0.00316,
)
def eva_s(*, damping: float | Tensor = 0.03, decay: Decay = "sum") -> Transform:
    """Eva-s, the vectorized Shampoo (Zhang, Shi & Li, arXiv 2308.02123).

    For the gradient G of a matrix, with its means over the columns and over the rows::

        u = mean_j G_:j                 (o,), summed or averaged over the steps
        v = mean_i G_i:                 (i,)
        d = (λ I + u uᵀ ⊗ v vᵀ)^-1 G = (G - (uᵀ G v) / (λ + ‖u‖² ‖v‖²) u vᵀ) / λ

    A tensor with more axes has one vector for each. Parameters with at most one axis longer than 1
    are divided by λ. ``fp.graft(fp.eva_s(), fp.sgd())`` gives each direction the length of its
    gradient, as in the authors' program.

    Args:
        damping: λ, in units of the squared entries of the gradient.
        decay: the weight of the old vectors in a moving average, or "sum", as in the authors'
            program.

    Returns:
        A method that needs the gradient only. Its state has one number for each row and column of a
        parameter. A step takes about 4 operations per entry and axis.

    Raises:
        ValueError: an option has a value that is not allowed.

    Example:
        >>> import torch, funcprecond as fp
        >>> opt, grads = fp.eva_s(damping=0.5), {"w": torch.ones(2, 2)}
        >>> _, direction = opt.update(opt.init(grads), grads)
        >>> direction["w"]                 # u = v = (1, 1), so that d = (1 - 4 / 4.5) / 0.5
        tensor([[0.2222, 0.2222],
                [0.2222, 0.2222]])
    """
    check_decay(decay)

    def init(params: Params) -> EvaSState:
        zeros = {k: _means(torch.zeros_like(p)) for k, p in params.items()}
        average = Average(zeros, treemath.scalar_like(params))
        return EvaSState(average, tuple(shapes_of(params).items()))

    def update(state: EvaSState, grads: Params) -> tuple[EvaSState, Params]:
        vectors = state.vectors.include({k: _means(g) for k, g in grads.items()}, decay)
        found = vectors.value()
        direction = {}
        for name, g in grads.items():
            x = g.to(factor_dtype(g))
            if parts := found[name]:
                outer = functools.reduce(torch.mul, _aligned(parts, g))
                square = math.prod([v.square().sum() for v in parts])
                x = x - (outer * x).sum() / (damping + square) * outer
            direction[name] = (x / damping).to(g.dtype)
        return EvaSState(vectors, state.shapes), direction

    return fitted(gradient_only(init, update), lambda state: dict(state.shapes))


def _means(g: Tensor) -> tuple[Tensor, ...]:
    """The mean over all axes but one, for each axis that is longer than 1, if there are several."""
    axes = _long(g)
    x = g.to(factor_dtype(g))
    return tuple(x.mean([*{*range(g.ndim)} - {a}]) for a in axes) if len(axes) > 1 else ()


def _long(g: Tensor) -> list[int]:
    return [a for a, n in enumerate(g.shape) if n > 1]


def _aligned(vectors: tuple[Tensor, ...], g: Tensor) -> list[Tensor]:
    """The vectors, each along its axis of g."""
    return [
        v.reshape([-1 if a == axis else 1 for a in range(g.ndim)])
        for v, axis in zip(vectors, _long(g), strict=True)
    ]
