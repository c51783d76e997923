"""Arithmetic with vectors that are dicts of tensors with the parameters' names and shapes."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from funcprecond.linalg.precision import factor_dtype, wide_dtype
from funcprecond.tracing import in_transform
from funcprecond.tree import Params

__all__ = [
    "add",
    "cast",
    "div",
    "dot",
    "fill",
    "mul",
    "norm",
    "ravel",
    "ravel_wide",
    "scalar_like",
    "sub",
    "sub_",
    "unravel",
    "where",
    "wide_dot",
    "zeros_like",
]


def add(x: Params, y: Params, alpha: float | Tensor = 1.0) -> Params:
    """``x + alpha * y`` for two dicts with the same keys."""
    # Where x or y is a matrix product, torch's compiler fuses the sum into it and loses alpha.
    if isinstance(alpha, Tensor) or torch.compiler.is_compiling():
        return {k: v + alpha * y[k] for k, v in x.items()}
    return _foreach("add", x, [y[k] for k in x], alpha=alpha)


def sub(x: Params, y: Params) -> Params:
    """``x - y`` for two dicts with the same keys."""
    return _foreach("sub", x, [y[k] for k in x])


def sub_(x: Params, y: Params) -> None:
    """``x - y`` in the memory of ``x``, for two dicts with the same keys."""
    if x:
        torch._foreach_sub_(list(x.values()), [y[k] for k in x])


def mul(x: Params, factor: float | Tensor) -> Params:
    """``factor * x``; the factor is a float or a 0-d tensor."""
    if isinstance(factor, Tensor) and torch.is_grad_enabled() and factor.requires_grad:
        return {k: v * factor for k, v in x.items()}
    return _foreach("mul", x, factor)


def div(x: Params, y: Params) -> Params:
    """``x / y``, entry by entry, for two dicts with the same keys."""
    return {k: v / y[k] for k, v in x.items()}


def cast(x: Params, like: Params) -> Params:
    """The entries of ``x`` for the keys of ``like``, in their order and with the dtypes there."""
    # ``to`` is skipped where it would return its input: in a small step even such calls count.
    return {k: x[k] if x[k].dtype == v.dtype else x[k].to(v.dtype) for k, v in like.items()}


def fill(x: Params, like: Params) -> Params:
    """``x`` with the keys and the dtypes of ``like``; entries that ``x`` does not have are zero."""
    return {k: x[k].to(v.dtype) if k in x else torch.zeros_like(v) for k, v in like.items()}


def where(condition: Tensor, x: Params, y: Params | float) -> Params:
    """``x`` where a 0-d condition is true, otherwise ``y``, which can also be a number."""
    return {k: torch.where(condition, v, y[k] if isinstance(y, dict) else y) for k, v in x.items()}


def zeros_like(params: Params) -> Params:
    """Zeros shaped like the parameters, in float32 or wider: the initial value of statistics."""
    return {k: torch.zeros_like(p, dtype=factor_dtype(p)) for k, p in params.items()}


def scalar_like(params: Params, value: float | Tensor = 0.0) -> Tensor:
    """``value`` as a 0-d tensor on the parameters' device, in float32 or wider."""
    first = next(iter(params.values()), torch.zeros(()))
    return first.new_zeros((), dtype=factor_dtype(first)) + value


def dot(x: Params, y: Params) -> Tensor:
    """The inner product over all entries, a 0-d tensor, accumulated in float32 or wider."""
    parts = [_lift(x[k]).reshape(-1).dot(_lift(y[k]).reshape(-1)) for k in x]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def wide_dot(x: Params, y: Params) -> Tensor:
    """The inner product over all entries, a 0-d tensor, summed in :func:`precision.wide_dtype`."""
    return torch.stack([(x[k] * y[k]).sum(dtype=wide_dtype(x[k])) for k in x]).sum()


def norm(x: Params) -> Tensor:
    """The Euclidean norm over all entries, a 0-d tensor."""
    return dot(x, x).sqrt()


def ravel(x: Mapping[str, Tensor]) -> Tensor:
    """All entries as one vector, in the order of the keys."""
    return torch.cat([v.reshape(-1) for v in x.values()]) if x else torch.zeros(0)


def ravel_wide(x: Params) -> Tensor:
    """All entries as one vector, in the widest of their dtypes, which is at least float32."""
    dtypes = (v.dtype for v in x.values())
    dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
    return ravel({k: v.to(dtype) for k, v in x.items()})


def unravel(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`ravel`: a dict of tensors with the keys and shapes of ``like``."""
    parts = vector.split([v.numel() for v in like.values()])
    return {k: p.reshape(v.shape) for (k, v), p in zip(like.items(), parts, strict=True)}


def _foreach(name: str, x: Params, other: Any, **kwargs: Any) -> Params:
    if not x:
        return {}
    tensors = list(x.values())
    if in_transform():
        # vmap has no batching rules for the multi-tensor operations.
        others = other if isinstance(other, list) else [other] * len(tensors)
        single = getattr(torch, name)
        values = [single(v, o, **kwargs) for v, o in zip(tensors, others, strict=True)]
    else:
        values = getattr(torch, f"_foreach_{name}")(tensors, other, **kwargs)
    return dict(zip(x, values, strict=True))


def _lift(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
