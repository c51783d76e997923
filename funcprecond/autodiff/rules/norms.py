"""Norm layers written out, so that they have derivatives of any order.

The third derivatives of torch's own functions are wrong in torch 2.13. These functions replace them
where a run that is differentiated twice is traced, so that it may be differentiated again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["NORMS"]


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``F.layer_norm``."""
    axes = tuple(range(-len(normalized_shape), 0))
    x, dtype = _widened(input)
    return _affine(_normalized(x, axes, eps), weight, bias).to(dtype)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """``F.rms_norm``."""
    axes = tuple(range(-len(normalized_shape), 0))
    x, dtype = _widened(input)
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    y = x * (x.square().mean(axes, keepdim=True) + eps).rsqrt()
    return _affine(y, weight, None).to(dtype)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``F.group_norm``."""
    x, dtype = _widened(input)
    groups = x.reshape(*x.shape[:1], num_groups, -1)
    y = _normalized(groups, (-1,), eps).reshape(x.shape)
    return _affine(y, _per_channel(weight, x), _per_channel(bias, x)).to(dtype)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm``, which also writes into the running statistics in training mode."""
    axes = (0, *range(2, input.ndim))
    values = running_mean, running_var, weight, bias, training, momentum, eps
    return _by_statistics(F.batch_norm, input, axes, *values)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.instance_norm``, which also writes into the running statistics in training mode."""
    axes = tuple(range(2, input.ndim))
    values = running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    return _by_statistics(F.instance_norm, input, axes, *values)


NORMS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    F.group_norm: group_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
}


def _by_statistics(
    function, input, axes, mean, variance, weight, bias, own, momentum, eps
) -> Tensor:
    x, dtype = _widened(input)
    if own:
        if torch.Size(x.shape[i] for i in axes).numel() == 1:
            msg = f"a norm layer in training mode needs more than one value, not {tuple(x.shape)}"
            raise ValueError(msg)
        if mean is not None:
            # Called for its change of the running statistics.
            function(input.detach(), mean, variance, None, None, True, momentum, eps)
        y = _normalized(x, axes, eps)
    else:
        y = (x - _per_channel(mean, x)) * (_per_channel(variance, x) + eps).rsqrt()
    return _affine(y, _per_channel(weight, x), _per_channel(bias, x)).to(dtype)


def _normalized(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    centered = x - x.mean(axes, keepdim=True)
    return centered * (centered.square().mean(axes, keepdim=True) + eps).rsqrt()


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _per_channel(values: Tensor | None, x: Tensor) -> Any:
    """Values (C,), shaped so that they go along axis 1 of x."""
    return None if values is None else values.reshape(-1, *[1] * (x.ndim - 2))


def _widened(x: Tensor) -> tuple[Tensor, torch.dtype]:
    """X in float32 or wider, as torch computes statistics, and the dtype of the result."""
    return x.to(torch.promote_types(x.dtype, torch.float32)), x.dtype
