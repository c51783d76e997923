"""The model linearized: opened once for many products, or one product with J or its transpose."""

from collections.abc import Callable
from typing import Any, overload

import torch

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.autodiff.missing_derivatives import explained
from funcprecond.curvature.arguments import batch_and_vector
from funcprecond.problems import Problem
from funcprecond.tree import Buffers, Params

__all__ = ["jvp", "linearize", "vjp"]


def linearize(
    problem: Problem,
    params: Params,
    batch: Any,
    *,
    buffers: Buffers | None = None,
    generator: torch.Generator | None = None,
) -> Evaluation:
    """One batch at one point, opened for many products.

    ``hvp``, ``ggn_mv``, ``jvp`` and ``pull`` (``J^T u``) of the result share one forward run, one
    set of dropout masks, and graphs that are kept until the result is let go.

    Args:
        problem, params, batch: what is linearized, and where.
        buffers: the model's buffers; the problem's own by default.
        generator: draws the dropout masks, if there are any.

    Returns:
        A :class:`funcprecond.Evaluation`, with which a Hessian product costs 1.3 to 2.2 gradients
        and a Gauss-Newton product 0.9 to 1.4.

    Raises:
        ValueError: random numbers are needed and there is no generator; the batch is empty.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(4, 3), fp.losses.cross_entropy)
        >>> batch = torch.rand(8, 4), torch.arange(8) % 3
        >>> opened = fp.linearize(problem, problem.params, batch)
        >>> products = [opened.hvp(v) for v in (problem.params, opened.grads)]
    """
    return Evaluation(problem, params, batch, buffers=buffers, generator=generator, twice=True)


@overload
def jvp(f: Callable[[Params], Any], params: Params, vector: Params, /) -> Any: ...


@overload
def jvp(
    problem: Problem,
    params: Params,
    batch: Any,
    vector: Params,
    /,
    *,
    buffers: Buffers | None = None,
    generator: torch.Generator | None = None,
) -> Any: ...


def jvp(
    f: Any,
    params: Params,
    /,
    *rest: Any,
    buffers: Buffers | None = None,
    generator: torch.Generator | None = None,
) -> Any:
    """``J vector``: the derivative of a function, or of a model's outputs, along a vector.

    It is called as ``jvp(f, params, vector)`` or ``jvp(problem, params, batch, vector)``.

    Args:
        f: a function of ``params`` to a tree of tensors; or a :class:`funcprecond.Problem`, whose
            model's outputs on ``batch`` are taken.
        params: where.
        *rest: for a problem the batch first; and the vector, shaped like ``params``.
        buffers: the model's buffers; the problem's own by default.
        generator: draws the model's dropout masks.

    Returns:
        A tree shaped like the outputs. Costs about one gradient.

    Raises:
        TypeError: the arguments fit neither form.
        NotImplementedError: torch has no derivative of a part of it.

    Example:
        >>> import torch, funcprecond as fp
        >>> x = {"x": torch.tensor([1.0, 2.0])}
        >>> fp.jvp(lambda p: p["x"] ** 2, x, x)
        tensor([2., 8.])
    """
    batch, vector = batch_and_vector("jvp", f, rest)
    if isinstance(f, Problem):
        opened = linearize(f, params, batch, buffers=buffers, generator=generator)
        return opened.jvp(vector, keep=False)
    return _push(f, params, vector)


@overload
def vjp(f: Callable[[Params], Any], params: Params, cotangents: Any, /) -> Params: ...


@overload
def vjp(
    problem: Problem,
    params: Params,
    batch: Any,
    cotangents: Any,
    /,
    *,
    buffers: Buffers | None = None,
    generator: torch.Generator | None = None,
) -> Params: ...


def vjp(
    f: Any,
    params: Params,
    /,
    *rest: Any,
    buffers: Buffers | None = None,
    generator: torch.Generator | None = None,
) -> Params:
    """``J^T cotangents``: what is shaped like the outputs, pulled back to the parameters.

    It is called as ``vjp(f, params, cotangents)`` or ``vjp(problem, params, batch, cotangents)``.

    Args:
        f: a function of ``params`` to a tree of tensors; or a :class:`funcprecond.Problem`, whose
            model's outputs on ``batch`` are taken.
        params: where.
        *rest: for a problem the batch first; and the cotangents, shaped like the outputs.
        buffers: the model's buffers; the problem's own by default.
        generator: draws the model's dropout masks.

    Returns:
        Shaped like ``params``. Costs one gradient.

    Raises:
        TypeError: the arguments fit neither form.

    Example:
        >>> import torch, funcprecond as fp
        >>> x = {"x": torch.tensor([1.0, 2.0])}
        >>> fp.vjp(lambda p: p["x"] ** 2, x, torch.ones(2))
        {'x': tensor([2., 4.])}
    """
    batch, cotangents = batch_and_vector("vjp", f, rest)
    if isinstance(f, Problem):
        options = {"buffers": buffers, "generator": generator}
        return Evaluation(f, params, batch, **options).pull(cotangents, keep=False)
    return torch.func.vjp(f, params)[1](cotangents)[0]


@explained
def _push(f: Callable[[Params], Any], params: Params, vector: Params) -> Any:
    return torch.func.jvp(f, (params,), (vector,))[1]
