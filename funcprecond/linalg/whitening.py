"""The Gram matrix of a gradient along each axis, after the other axes have been whitened."""

from torch import Tensor

from funcprecond.linalg.axes import along, mode_gram, mode_product
from funcprecond.linalg.eigenbases import rotate

__all__ = ["whitened"]


def whitened(
    g: Tensor, bases: tuple[Tensor, ...], roots: tuple[Tensor, ...], axes: tuple[int, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The Gram matrix of the whitened gradient along each axis, and its diagonal in the basis.

    Args:
        g: the gradient G.
        bases, roots: for each axis with a factor, the eigenbasis Q_i and the roots ``l_i^(-1/2)``
            of the eigenvalues of its factor S_i.
        axes: the axes with a factor.

    Returns:
        For each axis i the (n_i, n_i) matrix ``C_i(G ×_j S_j^(-1/2)) / Π n_j``, where C_i is the
        Gram matrix along axis i, and j runs over the other axes; and for each axis the diagonal of
        this matrix in the basis Q_i.
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
