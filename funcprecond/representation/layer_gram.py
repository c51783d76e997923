"""The Gram form of each layer's block of the Fisher matrix: ``U^T U``, stored as the rows of U."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcprecond.checks import listed
from funcprecond.layers.blocks import Layers, split_block
from funcprecond.layers.example_gradients import ExampleGradients
from funcprecond.layers.sketched_rows import (
    FactoredRows,
    FormedRows,
    columns,
    factors,
    leading_positions,
)
from funcprecond.tree import Params, state, static

__all__ = ["LayerGram"]


@state
class LayerGram:
    """The rows of each layer, with a sketch, from one measurement or from several.

    The dicts have one entry per block, and are empty until the first measurement.

    Attributes:
        left, right: the factors of the rows of affine layers, see
            :class:`funcprecond.layers.sketched_rows.FactoredRows`.
        formed: the rows of other layers, and of short ones with many positions, (R, D).
        weights: the weight of each row, (R,).
        others: the diagonal of the curvature for parameters that no layer covers.
        chosen_left, chosen_right: the columns that the sketch takes; a block without an entry is
            taken whole.
        counts: the number of measurements that each block consists of, 0-d.
        names, shapes: the parameters that this state covers.
    """

    left: dict[str, Tensor]
    right: dict[str, Tensor]
    formed: dict[str, Tensor]
    weights: dict[str, Tensor]
    others: dict[str, Tensor]
    chosen_left: dict[str, Tensor]
    chosen_right: dict[str, Tensor]
    counts: dict[str, Tensor]
    names: tuple[str, ...] = static()
    shapes: tuple[tuple[int, ...], ...] = static()

    @classmethod
    def init(cls, params: Params) -> "LayerGram":
        """Empty dicts, because the layers are found by the first measurement.

        Args:
            params: the parameters.

        Returns:
            The representation.
        """
        shapes = tuple(tuple(p.shape) for p in params.values())
        return cls({}, {}, {}, {}, {}, {}, {}, {}, tuple(params), shapes)

    @property
    def covered(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters that this state covers, by name."""
        return dict(zip(self.names, self.shapes, strict=True))

    def accumulate(
        self,
        value: Layers,
        params: Params,
        uniforms: Any = (),
        *,
        rank: int = 16,
        size: int = 256,
        window: int = 1,
    ) -> "LayerGram":
        """Include a measurement.

        Args:
            value: layer statistics whose rows belong to single examples.
            params: tensors with the shapes of the parameters.
            uniforms: (2, size), the random numbers of the sketch; without any, all columns count.
            rank: the number of positions that are kept of each example, see
                :func:`funcprecond.layers.sketched_rows.leading_positions`. The rows of a layer that
                has more positions and at most ``size²`` entries are formed instead.
            size: the number of columns that the sketch takes.
            window: the number of measurements that are kept; the matrix is their mean.

        Returns:
            The new representation. A block that the measurement lacks stays as it is, unless the
            measurement has one of its parameters in another block.
        """
        value = value.restrict(self.names)
        left, right, formed = {}, {}, {}
        for block, uses in value.uses.items():
            rows = _shortened(uses[0].call.example_gradients(uses, params), rank, size)
            if isinstance(rows, ExampleGradients):
                left[block], right[block] = factors(rows)
            else:
                flat = [rows[k].reshape(len(rows[k]), -1) for k in parameters(block)]
                formed[block] = torch.cat(flat, 1)
        weights, counts, others = {}, {}, {}
        for block in (*right, *formed, *value.others):
            old = self.counts.get(block, torch.zeros_like(value.scale))
            counts[block] = (old + 1).clamp_max(window)
            if block in value.others:
                new, mean = value.scale * value.others[block], self.others.get(block, 0.0)
                others[block] = mean + (new - mean) / counts[block]
                continue
            count = right[block].shape[1] if block in right else len(formed[block])
            new = (value.scale / counts[block]).expand(count)
            before = self.weights.get(block)
            before = before if before is None else before * old / counts[block]
            weights[block] = _windowed(new, before, 0, window)
        chosen_left, chosen_right = {}, {}
        if len(uniforms):
            dense = {k: x for k, x in left.items() if x.ndim > 3}
            chosen_left = _chosen(dense, size, uniforms[0])
            chosen_right = _chosen(right, size, uniforms[1])
        left = {k: _windowed(x, self.left.get(k), 1, window) for k, x in left.items()}
        right = {k: _windowed(x, self.right.get(k), 1, window) for k, x in right.items()}
        formed = {k: _windowed(x, self.formed.get(k), 0, window) for k, x in formed.items()}
        found = (left, right, formed, weights, others, chosen_left, chosen_right, counts)
        replaced = {k for block in counts for k in parameters(block)}
        kept = (
            {k: x for k, x in old.items() if replaced.isdisjoint(parameters(k))} | new
            for old, new in zip(self._dicts, found, strict=True)
        )
        return LayerGram(*kept, names=self.names, shapes=self.shapes)  # pyright: ignore

    def rows(self, block: str, like: Params) -> FactoredRows | FormedRows:
        """The rows U of a block, for Woodbury's formula.

        Args:
            block: the name of the block.
            like: tensors with the shapes of the parameters.
        """
        own = {k: like[k] for k in parameters(block)}
        if block in self.formed:
            return FormedRows(self.formed[block], self.weights[block], own)
        sides = (("left", self.chosen_left), ("right", self.chosen_right))
        chosen = {side: x[block] for side, x in sides if block in x}
        sides = self.left[block], self.right[block]
        return FactoredRows(*sides, self.weights[block], chosen, block, own)

    def check_restored(self) -> None:
        """Check that the rows belong to the parameters of :meth:`init`.

        :func:`funcprecond.from_dict` calls this, because an empty state takes rows of any name and
        size.

        Raises:
            ValueError: a block has other parameters or another size, or a parameter has none.
        """
        shapes = self.covered
        if not self.counts:
            return
        saved = {k for block in self.counts for k in parameters(block)}
        unknown, missing = sorted(saved - shapes.keys()), sorted(shapes.keys() - saved)
        if unknown or missing:
            msg = (
                f"the saved rows belong to another model: it has {listed(unknown)} that this one "
                f"lacks, and lacks {listed(missing)} of this one; restore them for the model that "
                "they were saved for"
            )
            raise ValueError(msg)
        for block in self.counts:
            expected = {k: shapes[k] for k in parameters(block)}
            if self._entries(block, expected) != sum(map(math.prod, expected.values())):
                msg = (
                    f"the saved rows of {block!r} do not fit parameters of the shapes {expected}: "
                    "restore them for the model that they were saved for"
                )
                raise ValueError(msg)

    def _entries(self, block: str, shapes: dict[str, tuple[int, ...]]) -> int:
        """The number of entries of a block that its tensors are for."""
        lead = self.counts[block].ndim  # the axes of a vmap
        if block in self.others:
            return math.prod(self.others[block].shape[lead:])
        if block in self.formed:
            return self.formed[block].shape[-1]
        left, right = self.left[block], self.right[block]
        one_hot = left.ndim == lead + 3
        tokens = math.prod(shapes[block][:-1]) if one_hot else left.shape[-1]
        return (1 if one_hot else left.shape[lead]) * tokens * right.shape[-1]

    @property
    def _dicts(self) -> tuple[dict[str, Tensor], ...]:
        rows = (self.left, self.right, self.formed, self.weights, self.others)
        return (*rows, self.chosen_left, self.chosen_right, self.counts)


def parameters(block: str) -> tuple[str, ...]:
    """The names of the parameters of a block."""
    return tuple(name for name in split_block(block) if name)


def _shortened(rows: Any, rank: int, size: int) -> Any:
    """The rows of a layer with few positions, formed or combined, or as they are."""
    if not isinstance(rows, ExampleGradients) or rows.one_hot or rows.inputs.shape[2] <= rank:
        return rows
    (groups, _, _, i), o = rows.inputs.shape, rows.grads.shape[-1]
    return rows.rows() if groups * i * o <= size**2 else leading_positions(rows, rank)


def _chosen(factors: dict[str, Tensor], size: int, uniforms: Tensor) -> dict[str, Tensor]:
    """The columns that the sketch takes of the factors that have more than ``size`` of them."""
    lengths = {k: x.shape[-1] for k, x in factors.items()}
    return {k: columns(n, uniforms) for k, n in lengths.items() if n > size}


def _windowed(new: Tensor, old: Tensor | None, axis: int, window: int) -> Tensor:
    """The new rows in front of the old ones, of as many rows as ``window`` times the new ones."""
    if window == 1:
        return new.contiguous()
    old = new.new_zeros(()).expand(new.shape).narrow(axis, 0, 0) if old is None else old
    # The positions differ where sequences have several lengths. Factors of zero add nothing.
    if new.ndim > 2:
        longest = max(new.shape[2], old.shape[2])
        new, old = (F.pad(x, (*(0, 0) * (x.ndim - 3), 0, longest - x.shape[2])) for x in (new, old))
    joined = torch.cat([new, old.to(new.dtype)], axis)
    count = window * new.shape[axis]
    short = max(0, count - joined.shape[axis])
    padding = (0, 0) * (joined.ndim - 1 - axis) + (0, short)
    return F.pad(joined, padding).narrow(axis, 0, count)
