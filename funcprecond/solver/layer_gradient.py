"""The shared parts of solvers with Kronecker factors: layers as matrices, and other parameters."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.evidence import Evidence
from funcprecond.layers.block_matrix import join, split
from funcprecond.layers.blocks import Layers, split_block
from funcprecond.layers.kinds.affine import AffineCall, with_ones
from funcprecond.layers.layer_call import LayerCall, LayerUse
from funcprecond.linalg.precision import factor_dtype
from funcprecond.losses.base import Labels
from funcprecond.tree import Params

__all__ = [
    "GRADIENT_ROWS",
    "BlockShape",
    "LayerGradient",
    "apply_blocks",
    "gradient_rows",
    "unit_inverses",
]


@dataclasses.dataclass(frozen=True)
class GradientRows(LayerStatistics):
    """The rows of the loss's gradient, whose outer products add up to the gradient.

    Only those of layers with few rows are kept, with which a product costs less than with the
    gradient itself. They are computed along with the gradient.
    """

    labels: Labels = "empirical"
    others: Literal["diagonal", "rows", "none"] = "none"
    differentiates: ClassVar[bool] = False

    def takes_gradient(self, call: LayerCall, inputs: Tensor) -> bool:
        if not isinstance(call, AffineCall) or not call.rows_are_given:
            return False
        o, i = call.shape[-1], inputs.shape[-1] + (call.bias is not None)
        return inputs.shape[:-1].numel() * (o * o + i * i + o * i) < o * i * (o + i)

    def measure(self, evaluation: Evaluation, noise: Any) -> Layers:
        layers = super().measure(evaluation, noise)
        few = {
            block: uses
            for block, uses in layers.uses.items()
            if len(uses) == 1 and self.takes_gradient(uses[0].call, uses[0].inputs)
        }
        return dataclasses.replace(layers, uses=few)


GRADIENT_ROWS = GradientRows()


class BlockShape(NamedTuple):
    """The shape of a layer's matrix: the number of groups, and the number of rows in each group."""

    groups: int
    rows: int

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> "BlockShape":
        """The shape of the matrix for two factors, each of which is square, thin or diagonal."""
        return cls(right.shape[0] if right.ndim == 3 else 1, left.shape[-1])

    @classmethod
    def of_side(
        cls, grads: Params, block: str, left: Tensor | None, right: Tensor | None, groups: int
    ) -> "BlockShape":
        """The shape of the matrix of a block, of which the size of one side is known.

        Args:
            grads: the gradient.
            block: the block, ``"weight+bias"`` or ``"weight"``.
            left: a tensor whose last axis is as long as the rows of the matrix, or None.
            right: if ``left`` is None, the same for its columns.
            groups: the number of groups.
        """
        if left is not None:
            return cls(groups, left.shape[-1])
        entries = sum(grads[name].numel() for name in split_block(block) if name)
        return cls(groups, entries // (groups * right.shape[-1]))  # pyright: ignore


@dataclasses.dataclass(frozen=True)
class LayerGradient:
    """The gradient of a layer's ``[W | b]``, which is ``outputs^T inputs``.

    Attributes:
        outputs: the output gradients, (M, o), or None, which stands for the identity.
        inputs: the inputs, (M, i + 1). Without ``outputs`` they are the gradient itself,
            (o, i + 1), or (J, o / J, i + 1) for J > 1 groups.
    """

    outputs: Tensor | None
    inputs: Tensor

    def map(
        self, left: Callable[[Tensor], Tensor], right: Callable[[Tensor], Tensor]
    ) -> "LayerGradient":
        """``L gradient R^T``.

        Args:
            left: ``x -> x L^T`` for a matrix x.
            right: ``x -> x R^T`` for a matrix x.

        Returns:
            The result, factored if the gradient is.
        """
        if self.outputs is None:
            return LayerGradient(None, left(right(self.inputs).mT).mT)
        return LayerGradient(left(self.outputs), right(self.inputs))

    def matrix(self) -> Tensor:
        """The gradient as a matrix, formed."""
        return self.inputs if self.outputs is None else self.outputs.mT @ self.inputs


def apply_blocks(
    grads: Params,
    blocks: Mapping[str, BlockShape],
    solve: Callable[[str, LayerGradient], LayerGradient],
    unit_inverse: dict[str, Tensor],
    others: Mapping[str, Tensor | float],
    damping: float | Tensor,
    rows: Layers | None = None,
) -> Params:
    """Solve for each layer and for each unit of a norm layer, and divide the other parameters.

    Args:
        grads: the gradient.
        blocks: the shape of each layer's matrix, by block.
        solve: ``(block, gradient) -> direction`` for one layer.
        unit_inverse: for each norm layer, the inverses of its units' blocks, (U, 2, 2).
        others: the curvature's diagonal, or a number, for parameters that no layer covers.
        damping: added to that diagonal.
        rows: the layers' rows of this gradient, if they are known. They are used where that costs
            less.

    Returns:
        The direction. A parameter without any curvature, such as one on which the loss does not
        depend, keeps its gradient.
    """
    found: Params = {}
    for block, shape in blocks.items():
        solved = solve(block, _gradient(grads, block, shape, rows))
        found |= split(solved.matrix(), grads, block)
    for block, inverse in unit_inverse.items():
        names = [name for name in split_block(block) if name]
        parts = [grads[name].reshape(-1).to(inverse.dtype) for name in names]
        solved = torch.einsum("upq,uq->up", inverse, torch.stack(parts, 1))
        found |= {k: solved[:, i].reshape(grads[k].shape) for i, k in enumerate(names)}
    found |= {k: grads[k] / (diagonal + damping) for k, diagonal in others.items()}
    return {k: found[k].to(g.dtype) if k in found else g for k, g in grads.items()}


def gradient_rows(grads: Params, evidence: Evidence | None) -> Layers | None:
    """The rows of ``grads``, if ``grads`` are the measured gradient, and its rows are known."""
    if evidence is None or GRADIENT_ROWS not in evidence or not evidence.is_own(grads):
        return None
    return evidence[GRADIENT_ROWS]


def unit_inverses(units: dict[str, Tensor], damping: float | Tensor) -> dict[str, Tensor]:
    """``(M + damping I)^-1`` for the blocks M of units, (U, 2, 2) or (U, 1, 1)."""
    inverses = {}
    for block, m in units.items():
        eye = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
        inverses[block] = torch.linalg.inv_ex(m + damping * eye).inverse
    return inverses


def _gradient(grads: Params, block: str, shape: BlockShape, rows: Layers | None) -> LayerGradient:
    use = _few_rows(block, rows)
    if use is None:
        return LayerGradient(None, join(grads, grads, block, shape.rows, shape.groups))
    g = use.grads.flatten(0, -2)
    inputs = use.inputs.flatten(0, -2).to(factor_dtype(g))
    biased = split_block(block)[1] is not None
    return LayerGradient(g.to(inputs.dtype), with_ones(inputs) if biased else inputs)


def _few_rows(block: str, rows: Layers | None) -> LayerUse | None:
    """The only use of a layer, if its rows are known and solving for them costs less; else None."""
    uses = () if rows is None else rows.uses.get(block, ())
    return uses[0] if uses else None
