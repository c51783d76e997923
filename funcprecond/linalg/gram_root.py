r"""Functions of a low-rank matrix :math:`B B^T` on its span, through its Gram matrix :math:`B^T B`."""

import torch
from torch import Tensor

from funcprecond.linalg.precision import decomposition_dtype

__all__ = ["inverse_root_coefficients"]


def inverse_root_coefficients(
    gram: Tensor, y: Tensor, *, damping: float | Tensor, epsilon: float | Tensor, outside: bool
) -> Tensor:
    """What B is to be multiplied by to give ``[(B B^T)^½ + λ I]^(-1) m`` on its span.

    With ``B^T B = V diag(s²) V^T`` it is ``V f(s) V^T B^T m`` for ``f(s) = 1 / ((s + λ) s²)``.

    Args:
        gram: (..., r, r), ``B^T B``.
        y: (..., r), ``B^T m``.
        damping: λ.
        epsilon: what is taken for the span, relative to the largest eigenvalue of the Gram matrix.
        outside: subtract what ``m / λ`` puts into the span, so that it can be added to the result.

    Returns:
        (..., r), not finite where the Gram matrix is not.
    """
    dtype = decomposition_dtype(gram)
    a = (gram + gram.mT).to(dtype) / 2
    scale = a.diagonal(dim1=-2, dim2=-1).amax(-1)
    finite = torch.isfinite(a).all(-1).all(-1)
    ok = finite & (scale > 0)
    eye = torch.eye(a.shape[-1], dtype=dtype, device=a.device)
    scale = torch.where(ok, scale, 1.0).unsqueeze(-1)
    a = torch.where(ok[..., None, None], a / scale.unsqueeze(-1), eye)
    squares, vectors = torch.linalg.eigh(a)
    kept = squares > epsilon * squares[..., -1:]
    squares = torch.where(kept, squares, 1.0) * scale
    f = 1 / (squares.sqrt() + damping)
    f = torch.where(kept, (f - 1 / damping if outside else f) / squares, 0.0)
    z = vectors @ (f.unsqueeze(-1) * (vectors.mT @ y.to(dtype).unsqueeze(-1)))
    # Of a window of zeros y is zero, and so is this.
    return torch.where(finite.unsqueeze(-1), z.squeeze(-1), torch.nan).to(y.dtype)
