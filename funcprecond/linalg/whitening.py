"""What each axis's factor sees of a gradient that the other axes have whitened."""

from torch import Tensor

from funcprecond.linalg.axes import along, mode_gram, mode_product
from funcprecond.linalg.eigenbases import rotate

__all__ = ["whitened"]


def whitened(
    g: Tensor, bases: tuple[Tensor, ...], roots: tuple[Tensor, ...], axes: tuple[int, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The Gram matrix of the whitened gradient along each axis, and its diagonal in the basis.

    Args:
        g: the gradient.
        bases, roots: Q_i and ``l_i^(-1/2)`` of its axes that have a factor.
        axes: those.

    Returns:
        (n_i, n_i) matrices, ``C_i(G ×_j S_j^(-1/2)) / Π n_j`` over the axes j other than i, and the
        diagonals of ``Q_i^T`` that ``Q_i``.
    """
    grams, magnitudes = [], []
    coordinates = None
    for i, axis in enumerate(axes):
        others = [j for j in range(len(axes)) if j != i]
        x = rotate(g, tuple(bases[j] for j in others), tuple(axes[j] for j in others))
        if coordinates is None:
            coordinates = mode_product(bases[i].mT, x, axis)
        scale = along(tuple(roots[j] for j in others), tuple(axes[j] for j in others), g)
        count = g.numel() // g.shape[axis]
        grams.append(mode_gram(x * scale, axis) / count)
        squares = (coordinates * scale).square()
        magnitudes.append(squares.movedim(axis, 0).flatten(1).mean(1))
    return tuple(grams), tuple(magnitudes)
