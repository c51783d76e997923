"""What the solvers of Kronecker-factored curvature share: layers as matrices, and the rest."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from funcprecond.curvature.layers import split_block
from funcprecond.problem import Params

__all__ = ["apply_blocks", "join", "split", "unit_inverses"]


def join(grads: Params, block: str, groups: int = 1) -> Tensor:
    """The block's gradient as a matrix: ``[W | b]`` with the bias as last column.

    (o, i + 1), or (J, o / J, i + 1) for J > 1 groups.
    """
    weight, bias = split_block(block)
    matrix = grads[weight].flatten(1)
    if bias is not None:
        matrix = torch.cat([matrix, grads[bias].unsqueeze(1)], 1)
    return matrix if groups == 1 else matrix.unflatten(0, (groups, -1))


def split(matrix: Tensor, grads: Params, block: str) -> Params:
    """The inverse of :func:`join`, in the shapes and dtypes of ``grads``."""
    weight, bias = split_block(block)
    matrix = matrix.reshape(grads[weight].shape[0], -1)
    parts = {}
    if bias is not None:
        matrix, column = matrix[:, :-1], matrix[:, -1]
        parts[bias] = column.to(grads[bias].dtype)
    parts[weight] = matrix.reshape(grads[weight].shape).to(grads[weight].dtype)
    return parts


def apply_blocks(
    grads: Params,
    blocks: Iterable[str],
    solve: Callable[[str, Tensor], Tensor],
    groups: Callable[[str], int],
    unit_inverse: dict[str, Tensor],
    others: dict[str, Tensor],
    damping: float | Tensor,
) -> Params:
    """Solve each layer's block, each norm layer's units, and divide the rest.

    A parameter that nothing is known of, such as one that no loss depends on, keeps its gradient.
    """
    found: Params = {}
    for block in blocks:
        matrix = join(grads, block, groups(block))
        found |= split(solve(block, matrix), grads, block)
    for block, inverse in unit_inverse.items():
        weight, bias = split_block(block)
        parts = [grads[name].reshape(-1).to(inverse.dtype) for name in (weight, bias) if name]
        solved = torch.einsum("upq,uq->up", inverse, torch.stack(parts, 1))
        for i, name in enumerate(n for n in (weight, bias) if n):
            found[name] = solved[:, i].reshape(grads[name].shape).to(grads[name].dtype)
    for name, diagonal in others.items():
        found[name] = (grads[name] / (diagonal + damping)).to(grads[name].dtype)
    return {k: found.get(k, g) for k, g in grads.items()}


def unit_inverses(units: dict[str, Tensor], damping: float | Tensor) -> dict[str, Tensor]:
    """``(M + damping I)^-1`` of (U, 2, 2) blocks."""
    inverses = {}
    for block, m in units.items():
        eye = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
        inverses[block] = torch.linalg.inv_ex(m + damping * eye).inverse
    return inverses
