"""What the solvers of Kronecker-factored curvature share: layers as matrices, and the rest."""

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from funcprecond.curvature.layer_statistics import Layers, LayerStatistics, LayerUse, split_block
from funcprecond.evidence import Evidence
from funcprecond.problems import Params
from funcprecond.representation.kronecker_io import layer_rows

__all__ = ["GRADIENT_ROWS", "LayerGradient", "apply_blocks", "gradient_rows", "unit_inverses"]

# The gradient of the loss itself, as the rows that it is a sum of outer products of.
GRADIENT_ROWS = LayerStatistics("empirical", others="none")


@dataclasses.dataclass(frozen=True)
class LayerGradient:
    """The gradient of a layer's ``[W | b]``: ``outputs^T inputs``.

    Attributes:
        outputs: (M, o) output gradients, or None for the identity.
        inputs: (M, i + 1) inputs; without outputs the gradient itself, (o, i + 1), or
            (J, o / J, i + 1) for J > 1 groups.
    """

    outputs: Tensor | None
    inputs: Tensor

    def map(
        self, left: Callable[[Tensor], Tensor], right: Callable[[Tensor], Tensor]
    ) -> "LayerGradient":
        """``L gradient R^T``, where ``left(x) = x L^T`` and ``right(x) = x R^T`` for rows x."""
        if self.outputs is None:
            return LayerGradient(None, left(right(self.inputs).mT).mT)
        return LayerGradient(left(self.outputs), right(self.inputs))

    def matrix(self) -> Tensor:
        """The gradient, (o, i + 1), with the groups of a convolution one after another."""
        if self.outputs is None:
            return self.inputs.flatten(0, -2)
        return self.outputs.mT @ self.inputs

    def split(self) -> tuple["LayerGradient", Tensor]:
        """The weight's part, and the bias's (o,)."""
        last = LayerGradient(self.outputs, self.inputs[..., -1:]).matrix().squeeze(-1)
        return LayerGradient(self.outputs, self.inputs[..., :-1]), last


def apply_blocks(
    grads: Params,
    blocks: Iterable[str],
    solve: Callable[[str, LayerGradient], LayerGradient],
    groups: Callable[[str], int],
    unit_inverse: dict[str, Tensor],
    others: dict[str, Tensor],
    damping: float | Tensor,
    rows: Layers | None = None,
) -> Params:
    """Solve each layer's block, each norm layer's units, and divide the rest.

    A parameter that nothing is known of, such as one that the loss does not depend on, keeps its
    gradient.
    """
    found: Params = {}
    for block in blocks:
        found |= _split(solve(block, _gradient(grads, block, groups(block), rows)), grads, block)
    for block, inverse in unit_inverse.items():
        names = [name for name in split_block(block) if name]
        parts = [grads[name].reshape(-1).to(inverse.dtype) for name in names]
        solved = torch.einsum("upq,uq->up", inverse, torch.stack(parts, 1))
        for i, name in enumerate(names):
            found[name] = solved[:, i].reshape(grads[name].shape).to(grads[name].dtype)
    for name, diagonal in others.items():
        found[name] = (grads[name] / (diagonal + damping)).to(grads[name].dtype)
    return {k: found.get(k, g) for k, g in grads.items()}


def gradient_rows(grads: Params, evidence: Evidence | None) -> Layers | None:
    """The rows of ``grads``, if they are the observed gradient itself and were measured."""
    if evidence is None or GRADIENT_ROWS not in evidence:
        return None
    untouched = all(g is evidence.grads.get(k) for k, g in grads.items())
    return evidence[GRADIENT_ROWS] if untouched else None


def unit_inverses(units: dict[str, Tensor], damping: float | Tensor) -> dict[str, Tensor]:
    """``(M + damping I)^-1`` of (U, 2, 2) blocks."""
    inverses = {}
    for block, m in units.items():
        eye = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
        inverses[block] = torch.linalg.inv_ex(m + damping * eye).inverse
    return inverses


def _gradient(grads: Params, block: str, groups: int, rows: Layers | None) -> LayerGradient:
    weight, bias = split_block(block)
    shape = (grads[weight].shape[0], grads[weight][0].numel() + (bias is not None))
    use = _few_rows(shape, block, rows)
    if use is not None:
        inputs, outputs = layer_rows(use, bias is not None, "expand")
        return LayerGradient(outputs, inputs)
    matrix = grads[weight].flatten(1)
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if bias is not None:
        matrix = torch.cat([matrix, grads[bias].unsqueeze(1).to(matrix.dtype)], 1)
    return LayerGradient(None, matrix if groups == 1 else matrix.unflatten(0, (groups, -1)))


def _few_rows(shape: tuple[int, int], block: str, rows: Layers | None) -> LayerUse | None:
    """A linear layer's rows, if there are so few that solving for them costs less."""
    uses = rows.uses.get(block, ()) if rows is not None else ()
    if len(uses) != 1 or uses[0].call.kind != "linear" or uses[0].call.options != ("out_in",):
        return None
    (o, i), count = shape, uses[0].inputs.shape[:-1].numel()
    cheaper = count * (o * o + i * i + o * i) < o * i * (o + i)
    return uses[0] if cheaper else None


def _split(gradient: LayerGradient, grads: Params, block: str) -> Params:
    """A layer's direction as its weight's and its bias's."""
    weight, bias = split_block(block)
    parts = {}
    if bias is not None:
        gradient, column = gradient.split()
        parts[bias] = column.to(grads[bias].dtype)
    parts[weight] = gradient.matrix().reshape(grads[weight].shape).to(grads[weight].dtype)
    return parts
