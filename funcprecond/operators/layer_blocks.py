"""Block-diagonal operators with one block per layer, each with the structure of the layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcprecond.layers.block_matrix import join, split
from funcprecond.layers.blocks import split_block
from funcprecond.operators.block_forms import Factors, Rotated, eigen_forms
from funcprecond.operators.operator import Operator
from funcprecond.tree import Params

__all__ = ["LayerBlocks"]


class LayerBlocks(Operator):
    """A block-diagonal operator with one block per layer.

    Args:
        like: the parameters.
        layers: for each ``"weight+bias"`` or ``"weight"``, the block that acts on ``[W | b]``: its
            Kronecker factors, or its eigenvalues and the factors' eigenbases.
        units: for each norm layer of U units, its blocks of shape (U, 2, 2), or (U, 1, 1) without a
            bias.
        others: the diagonal for parameters that no layer covers.
    """

    def __init__(
        self,
        like: Params,
        layers: dict[str, Any],
        units: dict[str, Tensor],
        others: dict[str, Tensor],
    ):
        self.like, self.layers, self.units, self.others = like, layers, units, others

    def matvec(self, vector: Params) -> Params:
        found: Params = {}
        for name, block in self.layers.items():
            weight, bias = split_block(name)
            lead = tuple(vector[weight].shape[: vector[weight].ndim - self.like[weight].ndim])
            matrix = join(vector, self.like, name, block.rows, block.groups)
            # With a bias, join() makes a new matrix, which may be overwritten.
            product = block.apply(matrix.to(block.right.dtype), fresh=bias is not None)
            found |= split(product, self.like, name, lead)
        for name, matrices in self.units.items():
            parts = [k for k in split_block(name) if k]
            lead = vector[parts[0]].ndim - self.like[parts[0]].ndim
            stacked = torch.stack([vector[k].flatten(lead) for k in parts], -1)
            solved = torch.einsum("upq,...uq->...up", matrices, stacked.to(matrices.dtype))
            found |= {k: solved[..., j].reshape(vector[k].shape) for j, k in enumerate(parts)}
        found |= {k: vector[k] * d for k, d in self.others.items()}
        return {k: found[k].to(v.dtype) if k in found else 0 * v for k, v in vector.items()}

    def matmat(self, vectors: Params, chunk_size: int | None = None) -> Params:
        # All vectors are multiplied at once: the products broadcast over leading axes.
        return self.matvec(vectors)

    def _block(self, names: Sequence[str]) -> Operator:
        chosen, like = set(names), {k: self.like[k] for k in names}

        def within(blocks):
            kept = {}
            for name, block in blocks.items():
                parts = {k for k in split_block(name) if k}
                if parts <= chosen:
                    kept[name] = block
                elif parts & chosen:
                    return None
            return kept

        blocks, units = within(self.layers), within(self.units)
        if blocks is None or units is None:
            # Only some of the parameters of a layer are in the block.
            return super()._block(names)
        others = {k: d for k, d in self.others.items() if k in chosen}
        return LayerBlocks(like, blocks, units, others)

    def diagonal(self) -> Params:
        found: Params = {}
        for name, block in self.layers.items():
            found |= split(block.diagonal(), self.like, name)
        for name, matrices in self.units.items():
            for j, k in enumerate(k for k in split_block(name) if k):
                found[k] = matrices[:, j, j].reshape(self.like[k].shape)
        found |= self.others
        return {k: found[k] if k in found else torch.zeros_like(p) for k, p in self.like.items()}

    def frobenius_norm(self) -> Tensor:
        parts = [block.squared_norm() for block in self.layers.values()]
        parts += [x.square().sum() for x in (*self.units.values(), *self.others.values())]
        return torch.stack(parts).sum().sqrt()

    def power(self, p: float, damping: float | Tensor = 0.0) -> "LayerBlocks":
        """``(C + damping I)^p``, exactly.

        Args:
            p: the exponent.
            damping: the multiple of the identity that is added to C.

        Returns:
            An operator with the same blocks. Costs one eigendecomposition per Kronecker factor, in
            one batch for each size.
        """

        def raised(x: Tensor) -> Tensor:
            return (x.clamp_min(0.0) + damping) ** p

        def unit(x: Tensor) -> Tensor:
            values, vectors = torch.linalg.eigh(x)
            return vectors @ (raised(values).unsqueeze(-1) * vectors.mT)

        return LayerBlocks(
            self.like,
            {k: b.map(raised) for k, b in self._rotated().items()},
            {k: unit(x) for k, x in self.units.items()},
            {k: raised(d) for k, d in self._rest().items()},
        )

    def inverse(self, damping: float | Tensor) -> "LayerBlocks":
        """``(C + damping I)^-1``, exactly.

        Args:
            damping: the multiple of the identity that is added to C.

        Returns:
            An operator with the same blocks. Costs as much as :meth:`power`.
        """
        return self.power(-1.0, damping)

    def logdet(self, damping: float | Tensor = 0.0) -> Tensor:
        """``log det (C + damping I)``, exactly.

        Args:
            damping: the multiple of the identity that is added to C.

        Returns:
            A 0-d tensor. Costs one eigendecomposition per Kronecker factor.
        """

        def damped(x: Tensor) -> Tensor:
            return x.clamp_min(0.0) + damping

        parts = [b.map(damped).logdet() for b in self._rotated().values()]
        values = [torch.linalg.eigvalsh(x) for x in self.units.values()]
        values += list(self._rest().values())
        return torch.stack([*parts, *(damped(x).log().sum() for x in values)]).sum()

    def _rest(self) -> dict[str, Tensor]:
        """The diagonal for the parameters without a block; zero if it was not measured."""
        covered = {k for name in (*self.layers, *self.units) for k in split_block(name) if k}
        rest = {k: p for k, p in self.like.items() if k not in covered}
        return {k: self.others.get(k, torch.zeros_like(p)) for k, p in rest.items()}

    def _rotated(self) -> dict[str, Rotated]:
        """All blocks in their eigenbases."""
        rotated = {k: b for k, b in self.layers.items() if isinstance(b, Rotated)}
        factors = {k: b for k, b in self.layers.items() if isinstance(b, Factors)}
        found = rotated | eigen_forms(factors)
        return {k: found[k] for k in self.layers}
