r"""Orthogonal bases of symmetric matrices, and tensors in them.

What SOAP, KL-Shampoo and SPlus keep of Shampoo's factors: one basis an axis, found by decomposition
(:func:`eigenvectors`) or followed by one QR decomposition a refresh (:func:`orthogonal_step`). To a
derivative, bases are constants.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from funcprecond.linalg.axes import multiply
from funcprecond.linalg.batching import by_shape
from funcprecond.linalg.precision import decomposition_dtype

__all__ = ["eigenvectors", "identities", "orthogonal_step", "rotate", "rotate_back"]

Bases = dict[str, tuple[Tensor, ...]]

# Eigenvalues below this many roundings of the largest one are rounding themselves.
NULL = 10
# Matrices of a multiple of so many rows get so many more for their QR decomposition.
ALIASING, ALIASING_PAD = 512, 8


def eigenvectors(matrices: Tensor, previous: Tensor) -> Tensor:
    """The eigenvectors of each matrix of a stack as columns, by descending eigenvalue.

    In the null space, where every basis is one of eigenvectors, it is the one in which diag(1..2)
    is diagonal. Left to rounding it would be another one in each dtype, under ``vmap``, or
    compiled; methods that divide by magnitudes make that a visible difference.

    Args:
        matrices: (..., n, n), symmetric positive semi-definite up to rounding.
        previous: what stays where a matrix is zero or not finite.
    """
    dtype = decomposition_dtype(matrices)
    a = matrices.detach()
    rounding = NULL * torch.finfo(a.dtype).eps
    a = (a + a.mT).to(dtype) / 2
    scale = a.diagonal(dim1=-2, dim2=-1).amax(-1)
    ok = torch.isfinite(a).all(-1).all(-1) & (scale > 0)
    ok, scale = ok[..., None, None], torch.where(ok, scale, 1.0)[..., None, None]
    eye = torch.eye(a.shape[-1], dtype=dtype, device=a.device)
    a = torch.where(ok, a / scale, eye)
    values, vectors = torch.linalg.eigh(a)
    null = vectors * (values <= rounding * values[..., -1:]).to(dtype).unsqueeze(-2)
    null = null @ null.mT
    ramp = torch.linspace(1, 2, a.shape[-1], dtype=dtype, device=a.device)
    # Eigenvalues of the range are positive, those of the null space now in [-2, -1] and apart.
    seen = a - null @ a @ null
    _, vectors = torch.linalg.eigh(seen - (null * ramp.unsqueeze(-2)) @ null)
    # LAPACK returns columns; a state that changes its strides would be compiled anew.
    return torch.where(ok, vectors.flip(-1).to(matrices.dtype), previous).contiguous()


def orthogonal_step(
    matrices: Tensor, bases: Tensor, epsilon: float | Tensor = 0.0, *, sort: bool = True
) -> Tensor:
    """One step of orthogonal iteration: ``qr(S Q)``.

    Args:
        matrices: (..., n, n), symmetric positive semi-definite up to rounding.
        bases: (..., n, n), orthogonal. Where a matrix is zero or not finite they stay.
        epsilon: S is shifted by this much of its largest eigenvalue, which leaves its eigenvectors
            as they are and keeps the old columns where S has seen nothing, instead of rounding.
        sort: take the columns by descending ``q_i^T S q_i``, which speeds convergence, instead of
            from left to right.

    Returns:
        The new bases. Each column has the place of the old one that it comes from, and its side
        (the triangular factor's diagonal is positive).
    """
    s, q = matrices.detach(), bases.detach()
    product = s @ q
    estimates = (q * product).sum(-2)
    # Not finite if any entry is not.
    largest = estimates.amax(-1)[..., None, None]
    bad = ~(torch.isfinite(largest) & (largest > 0))
    # Where this is not finite LAPACK's result is not either, and dropped below.
    x = product / largest + epsilon * q
    order = torch.sort(estimates, dim=-1, descending=True, stable=True).indices
    new, diagonal = _qr(_columns(x, order) if sort else x)
    new = new * torch.where(diagonal < 0, -1.0, 1.0).to(new.dtype).unsqueeze(-2)
    new = _columns(new, order.argsort(-1)) if sort else new
    # LAPACK returns columns; the result of ``where`` has the strides of its first tensor.
    return torch.where(bad, q, new).contiguous()


def _columns(x: Tensor, places: Tensor) -> Tensor:
    return x.gather(-1, places.unsqueeze(-2).expand_as(x))


def _qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """The orthogonal factor, and the diagonal alone of the triangular one."""
    n = x.shape[-1]
    # LAPACK walks along the rows of a matrix stored by columns. Those of a length that is a
    # multiple of 512 fall on few lines of the cache; rows of zeros below change nothing else.
    rows = ALIASING_PAD if x.device.type == "cpu" and n % ALIASING == 0 else 0
    reflectors, scales = torch.geqrf(pad(x, (0, 0, 0, rows)) if rows else x)
    q = torch.linalg.householder_product(reflectors, scales)
    return q[..., :n, :], reflectors.diagonal(dim1=-2, dim2=-1)


def decomposed(statistics: Bases, bases: Bases) -> Bases:
    """:func:`eigenvectors` of every factor, equal sizes as one stack."""
    return _of_all(lambda s, q, _: eigenvectors(s, q), statistics, bases)


def followed(
    statistics: Bases, bases: Bases, epsilon: float | Tensor, *, sort: bool = True
) -> Bases:
    """:func:`orthogonal_step` of every factor, equal sizes as one stack."""
    return _of_all(lambda s, q, _: orthogonal_step(s, q, epsilon, sort=sort), statistics, bases)


def _of_all(function: Callable[..., Tensor], *trees: Bases) -> Bases:
    flat = [[x for factors in t.values() for x in factors] for t in trees]
    found = iter(by_shape(function, *flat, static=[None] * len(flat[0])))
    return {k: tuple(next(found) for _ in f) for k, f in trees[0].items()}


def identities(p: Tensor, axes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """An identity for each of the axes of a parameter."""
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
    """The coordinates in the new bases of the tensor whose coordinates in the old ones are x.

    Each axis by ``Q_new^T Q_old``, or back and forth where that product costs more, on an axis
    longer than all others together.
    """
    short = [x.shape[i] ** 2 <= x.numel() for i in axes]
    for q, n, i, one in zip(old, new, axes, short, strict=True):
        if not one:
            x = multiply([n.mT], multiply([q], x, (i,)), (i,))
    kept = [(q, n, i) for q, n, i, one in zip(old, new, axes, short, strict=True) if one]
    return multiply([n.mT @ q for q, n, _ in kept], x, [i for *_, i in kept])


def eigenvalues_in(statistics: tuple[Tensor, ...], bases: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The diagonals ``q_i^T S q_i``, of each axis by the columns of its basis."""
    return tuple((q * (s @ q)).sum(-2) for s, q in zip(statistics, bases, strict=True))


def turned_eigenvalues(
    values: tuple[Tensor, ...], old: tuple[Tensor, ...], new: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The diagonals, in the new bases, of the matrices that are ``diag(values)`` in the old ones."""
    return tuple(x.square() @ v for x, v in zip(turns(old, new), values, strict=True))


def turned_squares(
    v: Tensor, old: tuple[Tensor, ...], new: tuple[Tensor, ...], axes: tuple[int, ...]
) -> Tensor:
    """The diagonal, in the new bases, of the matrix that is ``diag(v)`` in the old ones."""
    return multiply([x.square() for x in turns(old, new)], v, axes)


def turns(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``Q_new^T Q_old``: what takes old coordinates to new ones."""
    return tuple(n.mT @ o for o, n in zip(old, new, strict=True))
