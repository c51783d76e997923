"""The inverse root of a low-rank matrix :math:`B B^T`, from its Gram matrix :math:`B^T B`."""

import torch
from torch import Tensor

from funcprecond.linalg.eigh import separated_eigh
from funcprecond.linalg.precision import decomposition_dtype

__all__ = ["inverse_root_coefficients"]

# Eigenvalues that differ by this many machine epsilons times the largest one count as equal.
ROUNDING = 10


def inverse_root_coefficients(
    gram: Tensor, y: Tensor, *, damping: float | Tensor, epsilon: float | Tensor, outside: bool
) -> Tensor:
    """The vector z for which ``B z`` is ``[(B B^T)^½ + λ I]^(-1) m`` on the span of B.

    With ``B^T B = V diag(s²) V^T`` it is ``z = V f(s) V^T B^T m``, where
    ``f(s) = 1 / ((s + λ) s²)``.

    Args:
        gram: (..., r, r), ``B^T B``.
        y: (..., r), ``B^T m``.
        damping: λ.
        epsilon: eigenvalues of the Gram matrix up to this fraction of the largest one count as
            zero, and their eigenvectors do not belong to the span.
        outside: subtract the part of ``m / λ`` that lies in the span, so that ``B z + m / λ`` is
            the result on the whole space.

    Returns:
        (..., r), NaN where the Gram matrix is not finite.
    """
    dtype = decomposition_dtype(gram)
    a = (gram + gram.mT).to(dtype) / 2
    scale = a.diagonal(dim1=-2, dim2=-1).amax(-1)
    finite = torch.isfinite(a).all(-1).all(-1)
    ok = finite & (scale > 0)
    eye = torch.eye(a.shape[-1], dtype=dtype, device=a.device)
    scale = torch.where(ok, scale, 1.0).unsqueeze(-1)
    a = torch.where(ok[..., None, None], a / scale.unsqueeze(-1), eye)
    squares, vectors = separated_eigh(a, ROUNDING * torch.finfo(dtype).eps)
    kept = squares > epsilon * squares[..., -1:]
    squares = torch.where(kept, squares, 1.0) * scale
    f = 1 / (squares.sqrt() + damping)
    f = torch.where(kept, (f - 1 / damping if outside else f) / squares, 0.0)
    z = vectors @ (f.unsqueeze(-1) * (vectors.mT @ y.to(dtype).unsqueeze(-1)))
    # Where the Gram matrix is zero, y is zero, and therefore z is too.
    return torch.where(finite.unsqueeze(-1), z.squeeze(-1), torch.nan).to(y.dtype)
