"""Inverse roots by matrix products alone, for devices where a decomposition is slow.

Both iterations update two matrices that commute with A, and drive one of them or their product to
the identity. With a ridge of 1e-6 they are as accurate as float32 allows. They take stacks of
matrices and never synchronize with the host.
"""

import torch
from torch import Tensor

from funcprecond.linalg.polar import triples

__all__ = ["coupled_newton", "norm_bound", "polar_express"]

# This many steps are enough for singular values in [1e-3, 1].
_STEPS = 10


def polar_express(a: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """``A^(-1/p)`` for p = 2 or 4, by ten steps of four products per square root.

    Args:
        a: (..., n, n), symmetric positive definite, with a condition number up to about 1e6.
        p: 2 or 4.

    Returns:
        The roots, (..., n, n), and the largest entry of the iteration's last residual, (...,).
    """
    scale = norm_bound(a)
    root, inverse, error = _square_roots(a / scale)
    if p == 2:
        return inverse * scale**-0.5, error
    # The norm of the root is 1 up to the error of the iteration, for which 1.02 leaves room.
    _, inverse, error4 = _square_roots((root + root.mT) / 2.04)
    return inverse * (1.02 * scale**0.5) ** -0.5, torch.maximum(error, error4)


def coupled_newton(a: Tensor, p: int, steps: int = 40) -> tuple[Tensor, Tensor]:
    """``A^(-1/p)`` for any integer p, by Newton's coupled iteration (Guo & Higham, 2006).

    A matrix of the stack does not change any more once it has converged or its residual has begun
    to grow.

    Args:
        a: (..., n, n), symmetric positive definite, with a condition number up to about 1e6.
        p: a positive integer.
        steps: the maximum number of steps, each of which takes ``2 + log2 p`` products.

    Returns:
        The roots, (..., n, n), and the largest entry of the iteration's last residual, (...,).
    """
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    z = (1 + p) / (2 * torch.linalg.matrix_norm(a))[..., None, None]
    m, root = z * a, z ** (1 / p) * eye
    # The error is in the Frobenius norm, because the largest entry can grow at first in some bases.
    error = torch.linalg.matrix_norm(m - eye)
    tolerance = 10 * torch.finfo(a.dtype).eps
    going = torch.ones_like(error, dtype=torch.bool)
    for _ in range(steps):
        k = ((p + 1) * eye - m) / p
        new_m = torch.linalg.matrix_power(k, p) @ m
        new_error = torch.linalg.matrix_norm(new_m - eye)
        # An error that is not finite compares as not smaller, so that the step is not taken.
        going = going & (error > tolerance) & (new_error < 1.2 * error)
        here = going[..., None, None]
        m, root = torch.where(here, new_m, m), torch.where(here, root @ k, root)
        error = torch.where(going, new_error, error)
    return (root + root.mT) / 2, _distance(m, eye)


def _square_roots(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``A^(1/2)``, ``A^(-1/2)``, and the distance of their product from the identity.

    The eigenvalues of A must be in (0, 1].
    """
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    root, inverse = a, eye
    for c1, c3, c5 in triples("polar_express", _STEPS):
        square = inverse @ root
        polynomial = c1 * eye + c3 * square + c5 * (square @ square)
        root, inverse = root @ polynomial, polynomial @ inverse
    return root, (inverse + inverse.mT) / 2, _distance(inverse @ root, eye)


def norm_bound(a: Tensor) -> Tensor:
    """``|A^8|_F^(1/8)``, (..., 1, 1): between the spectral norm and ``n^(1/16)`` times it."""
    first = torch.linalg.matrix_norm(a)[..., None, None]
    power = a / first
    for _ in range(3):
        power = power @ power
    return first * torch.linalg.matrix_norm(power)[..., None, None] ** 0.125


def _distance(m: Tensor, eye: Tensor) -> Tensor:
    return (m - eye).abs().amax((-2, -1))
