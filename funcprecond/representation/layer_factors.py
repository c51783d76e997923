"""Statistics of layers, each the average of the measurements that have the layer."""

import dataclasses
import math
from typing import Self

from torch import Tensor

from funcprecond.checks import listed
from funcprecond.layers.blocks import split_block
from funcprecond.representation.average import (
    Decay,
    Present,
    accumulate,
    divisor,
    normalizer_after,
    present,
)
from funcprecond.tree import Params, state, static

__all__ = ["LayerFactors", "parameters"]


@state
class LayerFactors:
    """A statistic for each side of a layer's matrix ``[W | b]``, or for one of its sides.

    The dicts are empty until the first measurement, because layers are found by running the model.
    They contain totals, which are averages once divided by the normalizer of their block. A layer
    that a measurement leaves out, such as an expert without tokens, stays as it is. Where a batch
    uses a parameter in another layer than before, the new layer takes the place of the old one.

    Attributes:
        left: what acts on the rows of the matrix (:mod:`funcprecond.layers.block_matrix`), for each
            block ``"weight+bias"`` or ``"weight"``.
        right: what acts on its columns.
        normalizers: for each block, the number by which its totals are divided, a 0-d tensor. A
            parameter that was in no layer so far has the normalizer 0.
        names, shapes: the names and the shapes of the parameters.
    """

    left: dict[str, Tensor]
    right: dict[str, Tensor]
    normalizers: dict[str, Tensor]
    names: tuple[str, ...] = static()
    shapes: tuple[tuple[int, ...], ...] = static()

    @classmethod
    def init(cls, params: Params) -> Self:
        """Empty dicts.

        Args:
            params: the parameters.

        Returns:
            The representation.
        """
        return cls({}, {}, {}, tuple(params), tuple(tuple(p.shape) for p in params.values()))

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of the layers' blocks."""
        return (*self.left, *(k for k in self.right if k not in self.left))

    @property
    def covered(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters, by name."""
        return dict(zip(self.names, self.shapes, strict=True))

    def entries(self, block: str) -> int:
        """The number of entries of the parameters of a block."""
        return sum(math.prod(self.covered[k]) for k in parameters(block))

    def include(self, left: dict[str, Tensor], right: dict[str, Tensor], decay: Decay) -> Self:
        """Include the statistics of one batch.

        Args:
            left, right: the statistics by block.
            decay: see :mod:`funcprecond.representation.average`.

        Returns:
            The new representation.
        """
        found = {**left, **right}
        if not found:
            return self
        taken = {name for block in found for name in parameters(block)}
        kept = [k for k in self.blocks if k in found or taken.isdisjoint(parameters(k))]
        zero = next(iter(found.values())).new_zeros(())
        before = {k: self.normalizers.get(k, zero) for k in dict.fromkeys([*kept, *found])}
        now: dict[str, Present] = {k: present(before[k], decay) for k in found}
        after = {k: normalizer_after(x, now[k]) if k in now else x for k, x in before.items()}
        covered = {name for block in after for name in parameters(block)}
        unused = {k: zero.clone() for k in self.names if k not in covered}

        def merged(side: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
            old = {k: x for k, x in side.items() if k in kept}
            return old | {k: accumulate(old.get(k), x, now[k]) for k, x in new.items()}

        return dataclasses.replace(
            self,
            left=merged(self.left, left),
            right=merged(self.right, right),
            normalizers=after | unused,
        )

    def averages(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``left`` and ``right``, divided by their normalizers."""
        by = {k: divisor(self.normalizers[k]) for k in self.blocks}
        left, right = ({k: x / by[k] for k, x in side.items()} for side in (self.left, self.right))
        return left, right

    def check_restored(self) -> None:
        """Check that the statistics belong to the parameters of :meth:`init`.

        :func:`funcprecond.from_dict` calls this, because an empty state takes any names and sizes.

        Raises:
            ValueError: a block has other parameters, or its sizes do not divide theirs.
        """
        found = {k for block in self.normalizers for k in parameters(block)}
        unknown, missing = sorted(found - {*self.names}), sorted({*self.names} - found)
        if found and (unknown or missing):
            msg = (
                f"the saved statistics belong to another model: it has {listed(unknown)} that this "
                f"one lacks, and lacks {listed(missing)} of this one; restore them for the model "
                "that they were saved for"
            )
            raise ValueError(msg)
        for block in self.blocks:
            sides = [side[block] for side in (self.left, self.right) if block in side]
            if self.entries(block) % math.prod(x.shape[-1] for x in sides):
                shapes = {k: self.covered[k] for k in parameters(block)}
                msg = (
                    f"the saved statistics of {block!r} have the shapes "
                    f"{[tuple(x.shape) for x in sides]}, but the parameters have the shapes "
                    f"{shapes}: restore them for the model that they were saved for"
                )
                raise ValueError(msg)


def parameters(block: str) -> tuple[str, ...]:
    """The names of the parameters of a block."""
    return tuple(name for name in split_block(block) if name)
