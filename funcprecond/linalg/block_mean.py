"""Means over blocks of a tensor's entries."""

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Block", "block_mean"]

Block = Literal["kernel", "row"] | int


def block_mean(x: Tensor, block: Block | None) -> Tensor:
    """Each entry's mean over its block, shaped like ``x``.

    Args:
        x: any tensor.
        block: "kernel" is all axes from the third on, "row" all from the second on, a number n is n
            consecutive entries of a row (the last of a row may be shorter); None leaves the tensor
            as it is.
    """
    if block is None or x.numel() == 0:
        return x
    if isinstance(block, str):
        axes = tuple(range(2 if block == "kernel" else 1, x.ndim))
        return x.mean(axes, keepdim=True).expand_as(x) if axes else x
    rows = x.reshape(x.shape[0] if x.ndim > 1 else 1, -1)
    means = [part.mean(1, keepdim=True).expand_as(part) for part in rows.split(block, 1)]
    return torch.cat(means, 1).reshape(x.shape)
