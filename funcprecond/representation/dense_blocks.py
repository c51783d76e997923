"""Dense blocks of the Fisher matrix: of each layer, or one block of all parameters."""

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from funcprecond.checks import listed
from funcprecond.layers.blocks import Layers, split_block
from funcprecond.representation.average import Decay, accumulate, divisor, normalizer_after, present
from funcprecond.representation.gram import Gram
from funcprecond.tree import Params, state, static

__all__ = ["DenseBlocks"]

MAX_ENTRIES = 4096


@state
class DenseBlocks:
    """A symmetric (n, n) matrix for each block of n entries.

    The dicts are empty until the first measurement, because layers are found by running the model.

    Attributes:
        totals: the matrices, times their normalizers, by block: ``"weight+bias"``, ``"weight"``, or
            ``"all"`` for all parameters in their order.
        normalizers: 0-d, by block, see :mod:`funcprecond.representation.average`.
        names, shapes: the parameters that this state covers.
        whole: whether there is one block of all parameters.
    """

    totals: dict[str, Tensor]
    normalizers: dict[str, Tensor]
    names: tuple[str, ...] = static()
    shapes: tuple[tuple[int, ...], ...] = static()
    whole: bool = static(default=False)

    accepts: ClassVar[type] = Layers

    @classmethod
    def init(cls, params: Params, whole: bool = False) -> "DenseBlocks":
        """Empty dicts.

        Args:
            params: the parameters.
            whole: see the attributes.

        Returns:
            The representation.

        Raises:
            ValueError: ``whole`` is set, and the parameters have more than 4096 entries.
        """
        shapes = tuple(tuple(p.shape) for p in params.values())
        found = cls({}, {}, tuple(params), shapes, whole)
        if whole:
            found.check_size("all")
        return found

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks that were measured."""
        return tuple(self.totals)

    def parameters(self, block: str) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters of a block, in the order of its matrix."""
        shapes = dict(zip(self.names, self.shapes, strict=True))
        return shapes if self.whole else {k: shapes[k] for k in split_block(block) if k}

    def check_size(self, block: str) -> None:
        """Raise ValueError if the matrix of a block would have more than 4096 rows."""
        shapes = self.parameters(block)
        size = sum(map(math.prod, shapes.values()))
        if size > MAX_ENTRIES:
            msg = (
                f"the dense matrix of the parameters {listed(shapes)} would have {size} rows, and "
                f"the limit is {MAX_ENTRIES}: use smw_ng or kfac, or fp.partition to give these "
                "parameters to another method"
            )
            raise ValueError(msg)

    def accumulate(self, value: Layers, decay: Decay) -> "DenseBlocks":
        """Include a measurement.

        Args:
            value: layer statistics with the rows of single examples,
                :class:`funcprecond.curvature.ExampleRows`.
            decay: see :mod:`funcprecond.representation.average`.

        Returns:
            The new representation. Costs ``R n²`` operations for R rows and a block of n entries. A
            block that the measurement lacks stays as it is, unless the measurement has one of its
            parameters in another block.

        Raises:
            ValueError: a block has more than 4096 entries.
        """
        value = value.restrict(self.names)
        blocks = ("all",) if self.whole else (*value.uses, *value.others)
        totals, normalizers = {}, {}
        for block in blocks:
            self.check_size(block)
            shapes = self.parameters(block)
            like = {k: value.scale.new_empty(shape, device="meta") for k, shape in shapes.items()}
            old = self.normalizers.get(block, torch.zeros_like(value.scale))
            now = present(old, decay)
            matrix = Gram.from_layers(value, like).to_dense()
            totals[block] = accumulate(self.totals.get(block), (matrix + matrix.mT) / 2, now)
            normalizers[block] = normalizer_after(old, now)
        replaced = {k for block in blocks for k in self.parameters(block)}
        stay = [b for b in self.totals if replaced.isdisjoint(self.parameters(b))]
        return dataclasses.replace(
            self,
            totals={b: self.totals[b] for b in stay} | totals,
            normalizers={b: self.normalizers[b] for b in stay} | normalizers,
        )

    def matrices(self) -> dict[str, Tensor]:
        """The averaged matrix of each block."""
        return {k: x / divisor(self.normalizers[k]) for k, x in self.totals.items()}

    def check_restored(self) -> None:
        """Check that the matrices belong to the parameters of :meth:`init`.

        :func:`funcprecond.from_dict` calls this, because an empty state takes matrices of any name
        and size.

        Raises:
            ValueError: a block has other parameters or another size.
        """
        for block, matrix in self.totals.items():
            known = self.whole == (block == "all")
            known = known and (self.whole or {*split_block(block)} - {None} <= {*self.names})
            size = sum(map(math.prod, self.parameters(block).values())) if known else 0
            if matrix.shape[-1] != size:
                msg = (
                    f"the saved matrix of {block!r} has {matrix.shape[-1]} rows, which does not "
                    f"fit the parameters {listed(self.names)}: restore it for the model that it "
                    "was saved for"
                )
                raise ValueError(msg)
