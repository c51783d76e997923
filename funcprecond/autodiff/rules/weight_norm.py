"""Weight norm, written out: torch's own second derivative (2.13) is wrong on a CPU."""

from torch import Tensor

__all__ = ["weight_norm"]


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``torch._weight_norm``: g times v over its norm, for each index of ``dim`` or over all."""
    if dim == -1:
        return v * (g / v.norm())
    rows = v.movedim(dim, 0)
    return v * (g / rows.reshape(len(rows), -1).norm(dim=1).reshape(g.shape))
