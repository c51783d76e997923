"""Random tensors, drawn eagerly from an explicit generator.

A ``torch.Generator`` cannot enter a compiled function and has no meaning under ``vmap``, but the
drawn tensors can be used in both. All random numbers of the library are drawn by these functions,
on the device of the generator, so that the numbers do not depend on the device of the parameters.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["normal", "rademacher", "uniform"]


def uniform(
    shape: Sequence[int], generator: torch.Generator | None, *, dtype: torch.dtype, device
) -> Tensor:
    """Independent uniform numbers in [0, 1), of the given shape."""
    g = _require(generator)
    return torch.rand(tuple(shape), generator=g, dtype=dtype, device=g.device).to(device)


def normal(
    shape: Sequence[int], generator: torch.Generator | None, *, dtype: torch.dtype, device
) -> Tensor:
    """Independent standard normal numbers, of the given shape."""
    g = _require(generator)
    return torch.randn(tuple(shape), generator=g, dtype=dtype, device=g.device).to(device)


def rademacher(
    shape: Sequence[int], generator: torch.Generator | None, *, dtype: torch.dtype, device
) -> Tensor:
    """Independent signs, -1 or +1 with equal probability, of the given shape."""
    g = _require(generator)
    # Each 64-bit integer yields eight signs.
    count = math.prod(shape)
    words = torch.empty(-(-count // 8), dtype=torch.int64, device=g.device)
    words.random_(-(2**63), None, generator=g)
    bits = words.view(torch.int8)[:count].reshape(tuple(shape)).bitwise_and_(1)
    return bits.mul_(2).sub_(1).to(device=device, dtype=dtype)


def _require(generator: torch.Generator | None) -> torch.Generator:
    if generator is None:
        msg = (
            "random numbers are needed (probes, sampled labels or dropout masks), but no generator "
            "was given: pass generator=torch.Generator().manual_seed(0)"
        )
        raise ValueError(msg)
    return generator
