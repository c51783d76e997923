"""Eigenbases of symmetric matrices, and the coordinates of tensors in them.

SOAP, KL-Shampoo and SPlus keep one orthogonal basis per axis of a parameter. A decomposition finds
it (:func:`eigenvectors`), or one QR decomposition per refresh follows it (:func:`orthogonal_step`).
Both can be differentiated.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from funcprecond.linalg.axes import multiply
from funcprecond.linalg.batching import by_shape
from funcprecond.linalg.eigh import separated_eigh
from funcprecond.linalg.precision import decomposition_dtype
from funcprecond.tracing import is_differentiated

__all__ = ["eigenvectors", "identities", "orthogonal_step", "rotate", "rotate_back"]

Bases = dict[str, tuple[Tensor, ...]]

# Eigenvalues up to this many machine epsilons times the largest one count as zero.
NULL = 10
# A matrix whose size is a multiple of ALIASING gets ALIASING_PAD more rows in a QR decomposition.
ALIASING, ALIASING_PAD = 512, 8


def eigenvectors(matrices: Tensor, previous: Tensor) -> Tensor:
    """The eigenvectors of each matrix of a stack as columns, by descending eigenvalue.

    In the null space every orthonormal basis consists of eigenvectors. The result there is the
    basis that diagonalizes a fixed matrix, the diagonal matrix with entries from 1 to 2. A choice
    left to rounding would differ between dtypes, under ``vmap`` and under a compiler, and the
    difference would show in methods that divide by magnitudes.

    Args:
        matrices: (..., n, n), symmetric positive semi-definite up to rounding.
        previous: the result where a matrix is zero or not finite.
    """
    dtype = decomposition_dtype(matrices)
    rounding = NULL * torch.finfo(matrices.dtype).eps
    a = (matrices + matrices.mT).to(dtype) / 2
    scale = a.diagonal(dim1=-2, dim2=-1).amax(-1)
    ok = torch.isfinite(a).all(-1).all(-1) & (scale > 0)
    ok, scale = ok[..., None, None], torch.where(ok, scale, 1.0)[..., None, None]
    eye = torch.eye(a.shape[-1], dtype=dtype, device=a.device)
    a = torch.where(ok, a / scale, eye)
    values, vectors = separated_eigh(a, rounding)
    null = vectors * (values <= rounding * values[..., -1:]).to(dtype).unsqueeze(-2)
    null = null @ null.mT
    ramp = torch.linspace(1, 2, a.shape[-1], dtype=dtype, device=a.device)
    # Eigenvalues of the range are positive; those of the null space are now distinct, in [-2, -1].
    seen = a - null @ a @ null
    _, vectors = separated_eigh(seen - (null * ramp.unsqueeze(-2)) @ null, rounding)
    # LAPACK stores matrices by columns; a state whose strides change would be compiled again.
    return torch.where(ok, vectors.flip(-1).to(matrices.dtype), previous).contiguous()


def orthogonal_step(
    matrices: Tensor, bases: Tensor, epsilon: float | Tensor = 0.0, *, sort: bool = True
) -> Tensor:
    """One step of orthogonal iteration: ``qr(S Q)``.

    Args:
        matrices: (..., n, n), symmetric positive semi-definite up to rounding.
        bases: (..., n, n), orthogonal. They are returned where a matrix is zero or not finite.
        epsilon: S is shifted by this fraction of its largest eigenvalue. The shift does not change
            the eigenvectors. In the null space of S it keeps the old columns, which rounding errors
            would replace.
        sort: orthogonalize the columns in descending order of ``q_i^T S q_i``, which speeds
            convergence, instead of from left to right.

    Returns:
        The new bases. Each column has the place and the orientation of the old column that it comes
        from: the diagonal of the triangular factor is positive.
    """
    s, q = matrices, bases
    product = s @ q
    estimates = (q * product).sum(-2)
    # This is not finite if any entry of the matrix is not.
    largest = estimates.amax(-1)[..., None, None]
    bad = ~(torch.isfinite(largest) & (largest > 0))
    # Where x is not finite, LAPACK's result is not finite either; it is not used below.
    x = product / largest + epsilon * q
    order = torch.sort(estimates, dim=-1, descending=True, stable=True).indices
    new, diagonal = _qr(_columns(x, order) if sort else x)
    new = new * torch.where(diagonal < 0, -1.0, 1.0).to(new.dtype).unsqueeze(-2)
    new = _columns(new, order.argsort(-1)) if sort else new
    # LAPACK stores matrices by columns, and the result of ``where`` can inherit such strides.
    return torch.where(bad, q, new).contiguous()


def _columns(x: Tensor, places: Tensor) -> Tensor:
    return x.gather(-1, places.unsqueeze(-2).expand_as(x))


def _qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """The orthogonal factor of a QR decomposition, and the diagonal of the triangular factor."""
    if is_differentiated(x):
        q, triangle = torch.linalg.qr(x)
        return q, triangle.diagonal(dim1=-2, dim2=-1)
    n = x.shape[-1]
    # LAPACK goes along the rows of a matrix that is stored by columns. If the columns' length is a
    # multiple of 512, the entries of a row share few lines of the cache. Rows of zeros at the end
    # avoid this and do not change the decomposition.
    rows = ALIASING_PAD if x.device.type == "cpu" and n % ALIASING == 0 else 0
    reflectors, scales = torch.geqrf(pad(x, (0, 0, 0, rows)) if rows else x)
    q = torch.linalg.householder_product(reflectors, scales)
    return q[..., :n, :], reflectors.diagonal(dim1=-2, dim2=-1)


def decomposed(statistics: Bases, bases: Bases) -> Bases:
    """:func:`eigenvectors` of every factor, with factors of equal size in one stack."""
    return _of_all(lambda s, q, _: eigenvectors(s, q), statistics, bases)


def followed(
    statistics: Bases, bases: Bases, epsilon: float | Tensor, *, sort: bool = True
) -> Bases:
    """:func:`orthogonal_step` of every factor, with factors of equal size in one stack."""
    return _of_all(lambda s, q, _: orthogonal_step(s, q, epsilon, sort=sort), statistics, bases)


def _of_all(function: Callable[..., Tensor], *trees: Bases) -> Bases:
    flat = [[x for factors in t.values() for x in factors] for t in trees]
    found = iter(by_shape(function, *flat, static=[None] * len(flat[0])))
    return {k: tuple(next(found) for _ in f) for k, f in trees[0].items()}


def identities(p: Tensor, axes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """One identity matrix for each of the given axes of a parameter."""
    return tuple(torch.eye(p.shape[i], dtype=dtype, device=p.device) for i in axes)


def rotate(x: Tensor, bases: tuple[Tensor, ...], axes: tuple[int, ...]) -> Tensor:
    """The coordinates of x in the bases: ``x ×_i Q_i^T``."""
    return multiply([q.mT for q in bases], x, axes)


def rotate_back(x: Tensor, bases: tuple[Tensor, ...], axes: tuple[int, ...]) -> Tensor:
    """The tensor whose coordinates are x: ``x ×_i Q_i``."""
    return multiply(bases, x, axes)


def rotate_over(
    x: Tensor, old: tuple[Tensor, ...], new: tuple[Tensor, ...], axes: tuple[int, ...]
) -> Tensor:
    """The coordinates in the new bases of the tensor whose coordinates in the old bases are x.

    Each axis is multiplied by ``Q_new^T Q_old``. On an axis that is longer than all others
    together, this product costs more than the two rotations, which are then applied one after the
    other.
    """
    short = [x.shape[i] ** 2 <= x.numel() for i in axes]
    for q, n, i, one in zip(old, new, axes, short, strict=True):
        if not one:
            x = multiply([n.mT], multiply([q], x, (i,)), (i,))
    kept = [(q, n, i) for q, n, i, one in zip(old, new, axes, short, strict=True) if one]
    return multiply([n.mT @ q for q, n, _ in kept], x, [i for *_, i in kept])


def eigenvalues_in(statistics: tuple[Tensor, ...], bases: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """For each axis, ``q_i^T S q_i`` for the columns of its basis: the diagonal of ``Q^T S Q``."""
    return tuple((q * (s @ q)).sum(-2) for s, q in zip(statistics, bases, strict=True))


def turned_eigenvalues(
    values: tuple[Tensor, ...], old: tuple[Tensor, ...], new: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The diagonals, in the new bases, of the matrices with ``diag(values)`` in the old bases."""
    return tuple(x.square() @ v for x, v in zip(turns(old, new), values, strict=True))


def turned_squares(
    v: Tensor, old: tuple[Tensor, ...], new: tuple[Tensor, ...], axes: tuple[int, ...]
) -> Tensor:
    """The diagonal, in the new bases, of the matrix with ``diag(v)`` in the old bases."""
    return multiply([x.square() for x in turns(old, new)], v, axes)


def turns(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``Q_new^T Q_old`` for each axis, which maps old coordinates to new ones."""
    return tuple(n.mT @ o for o, n in zip(old, new, strict=True))


def floored(eigenvalues: Tensor, limit: int) -> Tensor:
    """Eigenvalues l, (n,), raised where ``1 / sqrt(l)`` exceeds ``max(10, min(n, limit))``."""
    return eigenvalues.clamp_min(max(10, min(eigenvalues.shape[-1], limit)) ** -2.0)
