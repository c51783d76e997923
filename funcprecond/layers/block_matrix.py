"""A layer's parameters as one matrix, which is what Kronecker factors act on from both sides.

The matrix is ``[W | b]``: the weight's axis 0 by all of its other axes, and the bias as a last
column. Of a weight that is stored with the inputs' axis first, the bias is a last row instead; the
number of rows of the left factor tells. The groups of a convolution are an axis in front.
"""

import torch
from torch import Tensor

from funcprecond.layers.blocks import split_block
from funcprecond.tree import Params

__all__ = ["join", "split"]


def join(vector: Params, like: Params, block: str, rows: int, groups: int = 1) -> Tensor:
    """The matrix of a layer's block.

    Args:
        vector: tensors shaped like the parameters, or stacks of them with further axes in front.
        like: the parameters.
        block: ``"weight+bias"`` or ``"weight"``.
        rows: how many rows the left factor acts on, in each group.
        groups: J.

    Returns:
        (..., rows, columns), or (..., J, rows, columns) for more than one group; float32 or wider.
    """
    weight, bias = split_block(block)
    lead = vector[weight].ndim - like[weight].ndim
    matrix = vector[weight].flatten(lead + 1)
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if bias is not None:
        axis = -1 if rows * groups == matrix.shape[-2] else -2
        matrix = torch.cat([matrix, vector[bias].unsqueeze(axis).to(matrix.dtype)], axis)
    return matrix if groups == 1 else matrix.unflatten(-2, (groups, -1))


def split(matrix: Tensor, like: Params, block: str, lead: tuple[int, ...] = ()) -> Params:
    """The inverse of :func:`join`, in the matrix's dtype; ``lead`` are the axes in front."""
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
