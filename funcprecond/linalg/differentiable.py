"""Functions with a wrong or an infinite derivative in torch, with the right one on demand."""

import torch
from torch import Tensor

from funcprecond.tracing import is_differentiated

__all__ = ["cholesky_inverse", "power"]


def power(x: Tensor, exponent: float) -> Tensor:
    """``x ** exponent`` for non-negative x and exponent, with the derivative 0 at 0.

    The root of a second moment is zero where all gradients are, such as for a unit that is never
    active. There it stays zero, whereas torch's derivative is infinite, and products of it are NaN.
    """
    if not is_differentiated(x) or exponent == 0 or exponent >= 1:
        return x.sqrt() if exponent == 0.5 else x**exponent
    positive = x > 0
    # The product keeps NaN.
    return torch.where(positive, torch.where(positive, x, 1.0) ** exponent, 0.0 * x)


def cholesky_inverse(lower: Tensor) -> Tensor:
    """``(L L^T)^-1``. The forward derivative of torch's function is wrong in torch 2.13."""
    if not is_differentiated(lower):
        return torch.cholesky_inverse(lower)
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.cholesky_solve(eye.expand_as(lower), lower)
