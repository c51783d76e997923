"""Cumulative log-sum-exp, written out, because torch's pull-back is not linear at zero."""

import torch
from torch import Tensor

__all__ = ["logcumsumexp"]


def logcumsumexp(input: Tensor, dim: int, *, out: Tensor | None = None) -> Tensor:
    """Compute ``torch.logcumsumexp``; with n entries along ``dim``, it takes n times their memory.

    The pull-back of torch 2.13 takes logarithms of the output gradients, so that at zero, where a
    product with the Jacobian differentiates it, its derivative is NaN.
    """
    if out is not None or input.ndim == 0:
        return torch.logcumsumexp(input, dim, out=out)  # pyright: ignore
    x = input.movedim(dim, -1)
    n = x.shape[-1]
    behind = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
    sums = x.unsqueeze(-2).masked_fill(behind, -torch.inf).logsumexp(-1)
    return sums.movedim(-1, dim)
