"""Eigendecompositions of symmetric matrices: of difficult ones, and with finite derivatives."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from funcprecond.linalg.batching import by_shape
from funcprecond.linalg.precision import wide, wide_dtype
from funcprecond.tracing import is_differentiated, is_traced

__all__ = ["eigenbases", "eigh", "separated_eigh", "thin_eigenbasis"]


def eigh(a: Tensor) -> tuple[Tensor, Tensor, bool]:
    """The eigenvalues and eigenvectors of ``a``, and whether the decomposition succeeded.

    LAPACK may fail in float32 on a matrix with many zeros or equal eigenvalues, with an error or
    with results that are not finite. The decomposition is then repeated on the :func:`wide`
    matrices. If that fails too, the eigenvalues are ones and the eigenvectors are zeros.
    """
    for matrix in (a, wide(a)):
        try:
            values, vectors = torch.linalg.eigh(matrix)
        except torch.linalg.LinAlgError:
            continue
        # Whether the results are finite is tested for LAPACK only, without the host having to wait.
        if (
            a.device.type != "cpu"
            or is_traced()
            or bool(values.isfinite().all() & vectors.isfinite().all())
        ):
            return values.to(a.dtype), vectors.to(a.dtype), True
    return torch.ones_like(a[..., 0]), torch.zeros_like(a), False


def _finite_eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues and eigenvectors of ``a``; NaN if the decomposition fails."""
    values, vectors, succeeded = eigh(a)
    return (values, vectors) if succeeded else (values * torch.nan, vectors * torch.nan)


def separated_eigh(a: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    r"""The eigenvalues and eigenvectors of ``a``, with finite derivatives of the eigenvectors.

    With :math:`M = V^T \dot A V`, the derivative of an eigenvector is

    .. math:: \dot v_j = \sum_i v_i M_{ij} / (\lambda_j - \lambda_i)

    Where two eigenvalues are equal, their eigenvectors are a choice and have no derivative. The sum
    leaves such pairs out, so that what does not depend on the choice, such as the projection onto
    an eigenspace, has the right derivative.

    Args:
        a: (..., n, n), symmetric.
        rounding: eigenvalues count as equal up to this fraction of the largest magnitude.
    """
    if not is_differentiated(a):
        return _finite_eigh(a)
    return _SeparatedEigh.apply(a, rounding)  # pyright: ignore[reportReturnType]


class _SeparatedEigh(Function):
    @staticmethod
    def forward(a, rounding):
        return _finite_eigh(a)

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        ctx.save_for_backward(*output)
        ctx.save_for_forward(*output)
        ctx.rounding = inputs[1]

    @staticmethod
    def backward(ctx: Any, g_values, g_vectors):
        values, vectors = ctx.saved_tensors
        inner = _inverse_gaps(values, ctx.rounding) * (vectors.mT @ g_vectors)
        inner = (inner + inner.mT) / 2 + torch.diag_embed(g_values)
        return vectors @ inner @ vectors.mT, None

    @staticmethod
    def jvp(ctx: Any, a, _):
        values, vectors = ctx.saved_tensors
        inner = vectors.mT @ ((a + a.mT) / 2) @ vectors
        turned = vectors @ (_inverse_gaps(values, ctx.rounding) * inner)
        return inner.diagonal(dim1=-2, dim2=-1).clone(), turned

    @staticmethod
    def vmap(info: Any, in_dims, a, rounding):
        return _SeparatedEigh.apply(a.movedim(in_dims[0], 0), rounding), (0, 0)


def _inverse_gaps(values: Tensor, rounding: float) -> Tensor:
    """``1 / (l_j - l_i)`` in entry (i, j), or zero where the two are equal up to rounding."""
    gaps = values.unsqueeze(-2) - values.unsqueeze(-1)
    equal = gaps.abs() <= rounding * values.abs().amax(-1)[..., None, None]
    return torch.where(equal, 0.0, 1 / torch.where(equal, 1.0, gaps))


def eigenbases(factors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The eigenvalues, clamped at zero, and the eigenvectors of each factor.

    A diagonal factor, (n,), has no eigenvectors. A factor that is not finite, or whose
    decomposition does not converge in the second attempt either, has the eigenvalues NaN, so that
    the fault shows in the direction instead of raising an error inside a compiled step.
    """
    values = {k: x.clamp_min(0.0) for k, x in factors.items() if x.ndim == 1}
    names = [k for k, x in factors.items() if x.ndim > 1]

    def decompose(stack: Tensor, _) -> Tensor:
        symmetric = (stack + stack.mT) / 2
        finite = torch.isfinite(symmetric).all(-1, keepdim=True).all(-2, keepdim=True)
        eye = torch.eye(stack.shape[-1], dtype=stack.dtype, device=stack.device)
        spectrum, vectors, converged = eigh(torch.where(finite, symmetric, eye))
        known = finite.squeeze(-1) & converged
        spectrum = torch.where(known, spectrum.clamp_min(0.0), torch.nan)
        return torch.cat([spectrum.unsqueeze(-2), vectors], -2)

    packed = by_shape(decompose, [factors[k] for k in names], static=[None] * len(names))
    vectors = {}
    for name, x in zip(names, packed, strict=True):
        values[name], vectors[name] = x[..., 0, :], x[..., 1:, :]
    return values, vectors


def thin_eigenbasis(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues, (..., r), and eigenvectors, (..., n, r), of ``rows^T rows``.

    Where an eigenvalue is as small as rounding errors of the largest one, it and its eigenvector
    are set to zero.
    """
    if rows.dtype == wide_dtype(rows):
        _, s, vectors = torch.linalg.svd(rows, full_matrices=False)
        values, vectors = s**2, vectors.mT
        limit = 2000 * torch.finfo(rows.dtype).eps ** 2
    else:
        # Products of float32 numbers are exact in float64, so the Gram matrix loses little.
        x = wide(rows)
        values, q, _ = eigh(x @ x.mT)
        values = values.clamp_min(0.0)
        vectors = x.mT @ q
        vectors = vectors / torch.where(values > 0, values, 1.0).sqrt().unsqueeze(-2)
        limit = 1e-9
    kept = values > limit * values.amax(-1, keepdim=True)
    values = torch.where(kept, values, 0.0)
    vectors = torch.where(kept.unsqueeze(-2), vectors, 0.0)
    return values.to(rows.dtype), vectors.to(rows.dtype)
