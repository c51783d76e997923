"""Statistics of layers, each the average of the measurements that have the layer."""

import dataclasses
import math
from typing import ClassVar, Self

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

__all__ = ["LayerAverages", "TwoSided", "parameters"]


@state
class LayerAverages:
    """Totals of statistics by block, which are averages once divided by the block's normalizer.

    A subclass has a dict of totals for each of its :attr:`parts`. The keys are the blocks
    ``"weight+bias"`` or ``"weight"``. The dicts are empty until the first measurement, because
    layers are found by running the model. A layer that a measurement leaves out, such as an expert
    without tokens, stays as it is. Where a batch uses a parameter in another layer than before, the
    new layer takes the place of the old one.

    Attributes:
        normalizers: for each block, the number by which its totals are divided, a 0-d tensor. A
            parameter that was in no block so far has the normalizer 0.
        names, shapes: the names and the shapes of the parameters.
    """

    normalizers: dict[str, Tensor]
    names: tuple[str, ...] = static()
    shapes: tuple[tuple[int, ...], ...] = static()

    parts: ClassVar[tuple[str, ...]] = ()
    """The names of the fields with totals."""

    @classmethod
    def init(cls, params: Params) -> Self:
        """Empty dicts.

        Args:
            params: the parameters.

        Returns:
            The representation.
        """
        shapes = tuple(tuple(p.shape) for p in params.values())
        return cls({}, tuple(params), shapes, **{part: {} for part in cls.parts})

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of the blocks that have a statistic."""
        return tuple(dict.fromkeys(k for part in self.parts for k in getattr(self, part)))

    @property
    def covered(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters, by name."""
        return dict(zip(self.names, self.shapes, strict=True))

    def include(self, decay: Decay, **found: dict[str, Tensor]) -> Self:
        """Include the statistics of one batch.

        Args:
            decay: see :mod:`funcprecond.representation.average`.
            **found: the statistics by part and block.

        Returns:
            The new representation.
        """
        new = {k: x for part in found.values() for k, x in part.items()}
        if not new:
            return self
        taken = {name for block in new for name in parameters(block)}
        kept = [k for k in self.blocks if k in new or taken.isdisjoint(parameters(k))]
        zero = next(iter(new.values())).new_zeros(())
        before = {k: self.normalizers.get(k, zero) for k in dict.fromkeys([*kept, *new])}
        now: dict[str, Present] = {k: present(before[k], decay) for k in new}
        after = {k: normalizer_after(x, now[k]) if k in now else x for k, x in before.items()}
        covered = {name for block in after for name in parameters(block)}
        unused = {k: zero.clone() for k in self.names if k not in covered}

        def merged(part: str) -> dict[str, Tensor]:
            old = {k: x for k, x in getattr(self, part).items() if k in kept}
            return old | {k: accumulate(old.get(k), x, now[k]) for k, x in found[part].items()}

        return dataclasses.replace(
            self, normalizers=after | unused, **{part: merged(part) for part in self.parts}
        )

    def averages(self) -> tuple[dict[str, Tensor], ...]:
        """The dicts of all parts, with totals divided by normalizers."""
        by = {k: divisor(self.normalizers[k]) for k in self.blocks}
        return tuple({k: x / by[k] for k, x in getattr(self, part).items()} for part in self.parts)

    def entries(self, block: str) -> int:
        """The number of entries of the parameters of a block."""
        return sum(math.prod(self.covered[k]) for k in parameters(block))

    def fits(self, block: str) -> bool:
        """Whether the totals of a block can be those of its parameters, by their shapes."""
        return True

    def check_restored(self) -> None:
        """Check that the statistics belong to the parameters of :meth:`init`.

        :func:`funcprecond.from_dict` calls this, because an empty state takes any names and sizes.

        Raises:
            ValueError: a block has other parameters or another size, or a parameter has none.
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
            if not self.fits(block):
                shapes = {k: self.covered[k] for k in parameters(block)}
                totals = [getattr(self, part).get(block) for part in self.parts]
                msg = (
                    f"the saved statistics of {block!r} have the shapes "
                    f"{[tuple(x.shape) for x in totals if x is not None]}, but the parameters have "
                    f"the shapes {shapes}: restore them "
                    "for the model that they were saved for"
                )
                raise ValueError(msg)


@state
class TwoSided(LayerAverages):
    """A statistic for each side of a layer's matrix ``[W | b]``, or for one of its sides.

    Attributes:
        normalizers, names, shapes: see :class:`funcprecond.representation.LayerAverages`.
        left: what acts on the rows of the matrix (:mod:`funcprecond.layers.block_matrix`), by
            block.
        right: what acts on its columns.
    """

    left: dict[str, Tensor]
    right: dict[str, Tensor]

    parts: ClassVar[tuple[str, ...]] = ("left", "right")

    def fits(self, block: str) -> bool:
        sides = [side[block] for side in (self.left, self.right) if block in side]
        return self.entries(block) % math.prod(x.shape[-1] for x in sides) == 0


def parameters(block: str) -> tuple[str, ...]:
    """The names of the parameters of a block."""
    return tuple(name for name in split_block(block) if name)
