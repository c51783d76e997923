"""Means over blocks of a tensor's entries."""

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Block", "block_mean"]

Block = Literal["kernel", "row"] | int


def block_mean(x: Tensor, block: Block | None) -> Tensor:
    """A tensor shaped like ``x`` in which each entry is the mean over its block.

    Args:
        x: any tensor. A vector counts as a single row.
        block: "kernel" takes the mean over all axes from the third on, and "row" over all axes from
            the second on. A number n takes it over n consecutive entries of each ``x[i]``; the last
            block may be shorter. None returns ``x`` unchanged.
    """
    if block is None or x.numel() == 0:
        return x
    if isinstance(block, str):
        axes = tuple(range(2 if block == "kernel" else 1, x.ndim))
        return x.mean(axes, keepdim=True).expand_as(x) if axes else x
    rows = x.reshape(x.shape[0] if x.ndim > 1 else 1, -1)
    means = [part.mean(1, keepdim=True).expand_as(part) for part in rows.split(block, 1)]
    return torch.cat(means, 1).reshape(x.shape)
