"""The parameters of a layer as one matrix, to which Kronecker factors are applied from both sides.

The matrix is ``[W | b]``. Its rows are indexed by the first axes of the weight, usually by axis 0
alone, and its columns by all other axes, and the bias is the last column. If axis 0 of the weight
is the axis of the inputs, then the bias is the last row instead; the number of rows of the left
factor distinguishes the two cases. The groups of a convolution are an axis in front.
"""

import torch
from torch import Tensor

from funcprecond.layers.blocks import split_block
from funcprecond.tree import Params

__all__ = ["join", "split"]


def join(vector: Params, like: Params, block: str, rows: int, groups: int = 1) -> Tensor:
    """Join the parameters of a layer's block into a matrix.

    Args:
        vector: tensors shaped like the parameters, or stacks of them with further axes in front.
        like: the parameters.
        block: the names of the parameters, ``"weight+bias"`` or ``"weight"``.
        rows: the number of rows of the matrix in each group, which the left factor acts on.
        groups: the number of groups, J.

    Returns:
        The matrix (..., rows, columns), or (..., J, rows, columns) for more than one group, in
        float32 or wider.
    """
    weight, bias = split_block(block)
    lead = vector[weight].ndim - like[weight].ndim
    # A bias alone is a matrix of one column.
    height = rows * groups if bias is None else like[weight].shape[0]
    matrix = vector[weight].reshape(*vector[weight].shape[:lead], height, -1)
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if bias is not None:
        axis = -1 if rows * groups == matrix.shape[-2] else -2
        matrix = torch.cat([matrix, vector[bias].unsqueeze(axis).to(matrix.dtype)], axis)
    return matrix if groups == 1 else matrix.unflatten(-2, (groups, -1))


def split(matrix: Tensor, like: Params, block: str, lead: tuple[int, ...] = ()) -> Params:
    """Split a matrix into the parameters of a block; the inverse of :func:`join`.

    Args:
        matrix: the matrix, from :func:`join`.
        like: the parameters.
        block: ``"weight+bias"`` or ``"weight"``.
        lead: the lengths of the further axes in front.

    Returns:
        The parameters (*lead, *shape), in the dtype of the matrix.
    """
    weight, bias = split_block(block)
    shape = like[weight].shape
    if bias is None:
        return {weight: matrix.reshape(*lead, *shape)}
    matrix = matrix.reshape(*lead, -1, matrix.shape[-1])
    axis = -1 if matrix.shape[-2] == shape[0] else -2
    size = matrix.shape[axis]
    return {
        bias: matrix.select(axis, size - 1),
        weight: matrix.narrow(axis, 0, size - 1).reshape(*lead, *shape),
    }
