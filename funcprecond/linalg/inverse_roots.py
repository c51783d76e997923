r"""Inverse roots :math:`(A + \epsilon \lambda_{max} I)^{-1/p}` of positive semi-definite matrices.

By eigendecomposition on a CPU, in float64: about twice the cost of float32, and exact to 3e-8 on
every spectrum, where float32 leaves an error of about 6e-8 / (p epsilon) in the smallest
eigenvalues. By products alone on other devices, whose decompositions go through a stack one matrix
at a time (:mod:`funcprecond.linalg.root_iterations`).
"""

from typing import Literal

import torch
from torch import Tensor

from funcprecond.linalg.axes import symmetric
from funcprecond.linalg.eigh import eigh
from funcprecond.linalg.precision import decomposition_dtype
from funcprecond.linalg.root_iterations import coupled_newton, norm_bound, polar_express

__all__ = ["Method", "Ridge", "chosen", "eigen_root", "inverse_root"]

Method = Literal["auto", "eigh", "polar_express", "coupled_newton"]
Ridge = Literal["inner", "outer"]


def inverse_root(
    matrices: Tensor,
    p: float | Tensor,
    *,
    epsilon: float | Tensor,
    method: Method = "auto",
    dtype: torch.dtype | None = None,
    ridge: Ridge = "inner",
) -> tuple[Tensor, Tensor]:
    """``(A + epsilon lambda_max I)^(-1/p)`` of each matrix of a stack.

    Args:
        matrices: (..., n, n), symmetric positive semi-definite up to rounding.
        p: any positive number; products need an integer, Polar Express 2 or 4.
        epsilon: the ridge, relative to each matrix's largest eigenvalue, or with products to a
            bound of it that is at most 1.6 times as large.
        method: "eigh", "polar_express", "coupled_newton"; "auto" is eigh on a CPU, and elsewhere
            the first of Polar Express, coupled Newton and eigh that can take this p.
        dtype: what to compute in; for eigh on a CPU float64, float32 otherwise by default.
        ridge: where it is added: "inner" as above, or "outer" for ``(A^(1/p) + epsilon
            lambda_max^(1/p) I)^-1``, which takes eigh.

    Returns:
        The roots, in the dtype of ``matrices``, and (...,) booleans: False where the matrix was
        zero or not finite or the method did not converge, and the root is meaningless.
    """
    if ridge == "outer" and method == "auto":
        method = "eigh"
    method = chosen(method, p, matrices.device)
    if ridge == "outer" and method != "eigh":
        msg = f"a ridge outside of the root takes method='eigh', not {method!r}"
        raise ValueError(msg)
    if method == "eigh":
        vectors, values, ok = eigen_root(
            matrices, 2 * p, epsilon=epsilon, dtype=dtype, as_computed=True, ridge=ridge
        )
        half = vectors * values.unsqueeze(-2)
        return symmetric(half).to(matrices.dtype), ok
    a, scale, ok = _scaled(matrices, dtype or torch.float32)
    a = a + epsilon * norm_bound(a) * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    iterate = polar_express if method == "polar_express" else coupled_newton
    root, residual = iterate(a, int(p))
    root = root * (scale ** (-1.0 / p))[..., None, None]
    return root.to(matrices.dtype), ok & (residual <= 0.1)


def eigen_root(
    matrices: Tensor,
    p: float | Tensor,
    *,
    epsilon: float | Tensor,
    dtype: torch.dtype | None = None,
    as_computed: bool = False,
    ridge: Ridge = "inner",
) -> tuple[Tensor, Tensor, Tensor]:
    """The same root in two parts: the eigenvectors, and each eigenvalue's root.

    Args:
        matrices, p, epsilon, dtype, ridge: see :func:`inverse_root`; the ridge is that of half the
            root, so that its square has the one of the whole.
        as_computed: return them in the dtype that they were computed in.

    Returns:
        (..., n, n) and (..., n), so that ``vectors diag(values) vectors^T`` is the root, and the
        booleans of :func:`inverse_root`.
    """
    if dtype is None:
        dtype = decomposition_dtype(matrices)
    a, scale, ok = _scaled(matrices, dtype)
    eigenvalues, vectors, converged = eigh(a)
    eigenvalues = eigenvalues.clamp_min(0.0)
    if ridge == "inner":
        values = (eigenvalues + epsilon * eigenvalues[..., -1:]) ** (-1.0 / p)
    else:
        roots = eigenvalues ** (2.0 / p)
        values = (roots + epsilon * roots[..., -1:]).rsqrt()
    values = values * (scale ** (-1.0 / p)).unsqueeze(-1)
    if not as_computed:
        vectors, values = vectors.to(matrices.dtype), values.to(matrices.dtype)
    return vectors, values, ok & converged


def _scaled(matrices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric, of mean eigenvalue 1; that mean; and False where there is none: the identity."""
    a = (matrices + matrices.mT).to(torch.promote_types(matrices.dtype, dtype))
    # One scale for all magnitudes, so that neither the computation nor a root over- or underflows.
    scale = a.diagonal(dim1=-2, dim2=-1).mean(-1)
    # One entry that is not finite is enough to make their sum so, in one pass.
    ok = torch.isfinite(a.sum((-2, -1))) & (scale > 0)
    scale = torch.where(ok, scale, 2.0)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return torch.where(ok[..., None, None], a / scale[..., None, None], eye), scale / 2, ok


def chosen(method: Method, p: float | Tensor, device: torch.device) -> Method:
    """What "auto" stands for; raises ValueError if the method cannot take this p."""
    whole = not isinstance(p, Tensor) and float(p).is_integer()
    if method == "auto":
        if device.type == "cpu" or not whole:
            return "eigh"
        return "polar_express" if p in (2, 4) else "coupled_newton"
    if method == "coupled_newton" and not whole:
        msg = f"coupled_newton takes integer roots, not p={p}: use eigh"
        raise ValueError(msg)
    if method == "polar_express" and (not whole or p not in (2, 4)):
        msg = f"polar_express takes square and fourth roots, not p={p}: use coupled_newton or eigh"
        raise ValueError(msg)
    if method not in ("eigh", "polar_express", "coupled_newton"):
        msg = f"method must be auto, eigh, polar_express or coupled_newton, not {method!r}"
        raise ValueError(msg)
    return method
