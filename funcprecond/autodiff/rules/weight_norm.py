"""Weight norm, written out because the second derivative of torch 2.13 is wrong on a CPU."""

from torch import Tensor

__all__ = ["weight_norm"]


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Compute ``torch._weight_norm``: g times v, divided by the norm of v.

    Args:
        v, g: the direction and the length of the weight.
        dim: the axis that has one norm for each index; -1 for a single norm of all entries.
    """
    if dim == -1:
        return v * (g / v.norm())
    rows = v.movedim(dim, 0)
    return v * (g / rows.reshape(len(rows), -1).norm(dim=1).reshape(g.shape))
