r"""Inverse roots :math:`(A + \epsilon \lambda_{max} I)^{-1/p}` of positive semi-definite matrices.

On a CPU they are computed by an eigendecomposition in float64. It takes about twice the time of one
in float32 and is accurate to 3e-8 for every spectrum, whereas float32 leaves an error of about 6e-8
/ (p epsilon) in the smallest eigenvalues. On other devices they are computed by matrix products
alone (:mod:`funcprecond.linalg.root_iterations`), because decompositions there process a stack one
matrix at a time.
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
    """``(A + epsilon lambda_max I)^(-1/p)`` of each matrix A of a stack.

    Here lambda_max is the largest eigenvalue of A.

    Args:
        matrices: (..., n, n), symmetric positive semi-definite up to rounding.
        p: the order of the root: any positive number for "eigh", an integer for "coupled_newton",
            and 2 or 4 for "polar_express".
        epsilon: the ridge relative to lambda_max. The methods other than "eigh" use an upper bound
            of lambda_max, which is at most ``n^(1/16)`` times as large (1.6 for n = 2048).
        method: "eigh", "polar_express" or "coupled_newton". The default "auto" is "eigh" on a CPU,
            and elsewhere the first of "polar_express", "coupled_newton" and "eigh" that can compute
            this p.
        dtype: the dtype of the computation, unless that of ``matrices`` is wider. The default is
            float64 for "eigh" on a CPU, and float32 otherwise.
        ridge: "inner" adds the ridge to A, as above. "outer" computes
            ``(A^(1/p) + epsilon lambda_max^(1/p) I)^-1`` instead, and requires "eigh", which "auto"
            then selects.

    Returns:
        The roots, (..., n, n), in the dtype of ``matrices``, and booleans, (...,). A boolean is
        False where the matrix is not finite, where its mean eigenvalue is below the normal numbers
        of its dtype, or where the method did not converge; the root is then meaningless. Costs one
        eigendecomposition per matrix with "eigh", 40 matrix products per square root with
        "polar_express", and up to ``40 (2 + log2 p)`` with "coupled_newton".

    Raises:
        ValueError: ``method`` does not exist or cannot compute this p, or ``ridge="outer"`` is
            combined with a method other than "eigh".

    Example:
        >>> import torch, funcprecond as fp
        >>> matrices = torch.diag(torch.tensor([1.0, 16.0]))
        >>> root, ok = fp.linalg.inverse_root(matrices, 4, epsilon=0.0)
        >>> torch.allclose(root, torch.diag(torch.tensor([1.0, 0.5]))), bool(ok)
        (True, True)
    """
    if ridge == "outer" and method == "auto":
        method = "eigh"
    method = chosen(method, p, matrices.device)
    if ridge == "outer" and method != "eigh":
        msg = (
            f"ridge='outer' requires method='eigh', not {method!r}: use method='eigh', or "
            "ridge='inner'"
        )
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
    """The root of :func:`inverse_root` in two parts: eigenvectors and roots of the eigenvalues.

    Args:
        matrices, p, epsilon, dtype: see :func:`inverse_root`.
        as_computed: return both parts in the dtype of the computation, not in that of ``matrices``.
        ridge: see :func:`inverse_root`. For "outer" the roots are
            ``(l^(2/p) + epsilon lambda_max^(2/p))^(-1/2)`` for eigenvalues l, so that their squares
            are the roots of order p / 2 with an outer ridge.

    Returns:
        The eigenvectors, (..., n, n), and the roots of the eigenvalues, (..., n), such that
        ``vectors diag(values) vectors^T`` is the root; and the booleans of :func:`inverse_root`.
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
    """The symmetric parts scaled to a mean eigenvalue of 1, the means, and whether they are valid.

    Where a matrix is not finite or its mean eigenvalue is not a positive normal number, the results
    are the identity, 1 and False.
    """
    least = torch.finfo(matrices.dtype).tiny
    a = (matrices + matrices.mT).to(torch.promote_types(matrices.dtype, dtype))
    # With a mean eigenvalue of 1, neither the computation nor a root overflows or underflows.
    scale = a.diagonal(dim1=-2, dim2=-1).mean(-1)
    # The sum is not finite if any entry is not, and it takes one pass over memory.
    ok = torch.isfinite(a.sum((-2, -1))) & (scale >= 2 * least)
    scale = torch.where(ok, scale, 2.0)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return torch.where(ok[..., None, None], a / scale[..., None, None], eye), scale / 2, ok


def chosen(method: Method, p: float | Tensor, device: torch.device) -> Method:
    """The method that "auto" stands for, or the given method.

    Raises:
        ValueError: the method does not exist or cannot compute this p.
    """
    whole = not isinstance(p, Tensor) and float(p).is_integer()
    if method == "auto":
        if device.type == "cpu" or not whole:
            return "eigh"
        return "polar_express" if p in (2, 4) else "coupled_newton"
    if method == "coupled_newton" and not whole:
        msg = f"method='coupled_newton' requires an integer p, not p={p}: use method='eigh'"
        raise ValueError(msg)
    if method == "polar_express" and (not whole or p not in (2, 4)):
        msg = (
            f"method='polar_express' computes square and fourth roots only, not p={p}: use "
            "method='coupled_newton' for an integer p, or method='eigh'"
        )
        raise ValueError(msg)
    if method not in ("eigh", "polar_express", "coupled_newton"):
        msg = f"method must be 'auto', 'eigh', 'polar_express' or 'coupled_newton', not {method!r}"
        raise ValueError(msg)
    return method
