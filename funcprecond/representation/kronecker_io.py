"""Layer-wise Kronecker factors of the Fisher matrix: output gradients ⊗ inputs.

The block of a layer is approximated by ``left ⊗ right``, with one factor for each axis of its
matrix ``[W | b]``. For a linear layer of shape (o, i + 1) the factors are second moments:
``left = scale Σ g g^T`` of the output gradients, and ``right = mean [a, 1] [a, 1]^T`` of the
inputs. Only their product has a meaning; it is in units of the loss.
"""

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from funcprecond.layers.blocks import Layers, split_block
from funcprecond.layers.kinds.affine import AffineCall
from funcprecond.layers.kinds.scale import Scale
from funcprecond.layers.layer_call import LayerUse, Sharing
from funcprecond.linalg.gram import is_thin, square
from funcprecond.linalg.nearest_kronecker import nearest_kronecker
from funcprecond.linalg.treemath import scalar_like
from funcprecond.representation.average import Decay, accumulate, normalizer_after, present
from funcprecond.tree import Params, state, static

__all__ = ["KroneckerIO"]

Uses = tuple[LayerUse, ...]


@state
class KroneckerIO:
    """The Kronecker factors of every layer, and other curvature for parameters without factors.

    The dicts are empty until the first measurement, because layers are found by running the model.
    They contain totals, which are averages once divided by ``normalizer``.

    Attributes:
        left: for each block ``"weight+bias"`` (or ``"weight"``), the factor on the side of the rows
            of its matrix, see :mod:`funcprecond.layers.block_matrix`: (o, o); (J, o / J, o / J) for
            a convolution of J groups; or a diagonal (V,) for an embedding of V tokens, whether or
            not it is tied to a linear layer.
        right: likewise the factor on the side of the columns, (i + 1, i + 1).
        units: for a norm layer of U units, the exact blocks of scale and bias of each unit,
            (U, 2, 2), or (U, 1, 1) without a bias.
        others: the diagonal of the curvature for parameters that no layer covers.
        normalizer: 0-d, see :mod:`funcprecond.representation.average`.
        names: the names of the parameters that this state covers.
        shapes: their shapes, with which a restored state is checked; empty if they are not known.
        thin: store a factor of a local measurement (``decay=None``) as X, (r, n), if it is
            ``X^T X`` with r < n.
        max_dim: of a factor for a longer axis, only the diagonal is measured and stored, (o,) or
            (i + 1,); 0 means no limit. The limit does not apply to a convolution of several groups,
            whose factors are small.
    """

    left: dict[str, Tensor]
    right: dict[str, Tensor]
    units: dict[str, Tensor]
    others: dict[str, Tensor]
    normalizer: Tensor
    names: tuple[str, ...] = static()
    thin: bool = static(default=False)
    max_dim: int = static(default=0)
    shapes: tuple[tuple[int, ...], ...] = static(default=())

    accepts: ClassVar[type] = Layers

    @classmethod
    def init(cls, params: Params, thin: bool = False, max_dim: int = 0) -> "KroneckerIO":
        """Empty dicts, because the layers are found by the first measurement.

        Args:
            params: the parameters.
            thin, max_dim: see the attributes.

        Returns:
            The representation.
        """
        shapes = tuple(tuple(p.shape) for p in params.values())
        return cls({}, {}, {}, {}, scalar_like(params), tuple(params), thin, max_dim, shapes)

    @property
    def covered(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters that this state covers, by name."""
        return dict(zip(self.names, self.shapes, strict=True))

    def accumulate(self, value: Layers, decay: Decay) -> "KroneckerIO":
        """Include a measurement of the layers.

        Args:
            value: the layer statistics.
            decay: see :mod:`funcprecond.representation.average`.

        Returns:
            The new representation. Costs one Gram matrix per factor.
        """
        value, now = value.restrict(self.names), present(self.normalizer, decay)
        empty = dataclasses.replace(
            self, left={}, right={}, units={}, others={}, thin=self.thin and decay is None
        )
        new = empty.with_cotangents(value).with_inputs(value.uses, value.sharing)

        def merge(old: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
            return {k: accumulate(old.get(k), x, now) for k, x in new.items()}

        return dataclasses.replace(
            self,
            left=merge(self.left, new.left),
            right=merge(self.right, new.right),
            units=merge(self.units, new.units),
            others=merge(self.others, new.others),
            normalizer=normalizer_after(self.normalizer, now),
        )

    def with_cotangents(self, value: Layers) -> "KroneckerIO":
        """Include cotangents alone: the factors of output gradients, and curvature without factors.

        A sum over many cotangents can thus be taken one by one, without keeping their gradients.
        The factors of the inputs come from :meth:`with_inputs`. A tied embedding gets both of its
        factors here, so that it requires all cotangents in one call.

        Args:
            value: the layer statistics of some cotangents.

        Returns:
            The new representation.
        """
        value = value.restrict(self.names)
        left, right, units = dict(self.left), dict(self.right), dict(self.units)
        for block, uses in value.uses.items():
            call = uses[0].call
            if isinstance(call, Scale):
                new = call.unit_blocks(uses, split_block(block)[1] is not None, value.scale)
                units[block] = units[block] + new if block in units else new
            elif _are_tied(uses):
                left[block], right[block] = self._tied_factors(uses, value.sharing, value.scale)
            else:
                side = right if call.inputs_first else left
                new = self._output_factor(uses, value.sharing, value.scale)
                side[block] = _joined(side[block], new) if block in side else new
        others = {k: d * value.scale for k, d in value.others.items()}
        others = {k: self.others[k] + d if k in self.others else d for k, d in others.items()}
        return dataclasses.replace(self, left=left, right=right, units=units, others=others)

    def with_inputs(self, blocks: dict[str, Uses], sharing: Sharing) -> "KroneckerIO":
        """Include the inputs of layers whose cotangents are already included.

        Args:
            blocks: the uses of each block.
            sharing: see :class:`funcprecond.curvature.LayerStatistics`.

        Returns:
            The new representation, with a normalizer of 1.
        """
        left, right = dict(self.left), dict(self.right)
        for block, uses in blocks.items():
            call = uses[0].call
            if isinstance(call, AffineCall) and not _are_tied(uses):
                side = left if call.inputs_first else right
                bias = split_block(block)[1] is not None
                side[block] = self._input_factor(uses, bias, sharing)
        one = torch.ones_like(self.normalizer)
        return dataclasses.replace(self, left=left, right=right, normalizer=one)

    def block(self, name: str) -> Tensor:
        """The curvature of a layer as a dense matrix, in the order of its flattened ``[W | b]``.

        Args:
            name: the name of the block.

        Returns:
            (n, n) for a layer of n entries.
        """
        left, right = (square(x) / self.normalizer for x in (self.left[name], self.right[name]))
        left, right = (x.diag() if x.ndim == 1 else x for x in (left, right))
        if left.ndim == 2:
            return torch.kron(left.contiguous(), right.contiguous())
        return torch.block_diag(
            *(torch.kron(x.contiguous(), y.contiguous()) for x, y in zip(left, right, strict=True))
        )

    def check_restored(self) -> None:
        """Check that the factors belong to the parameters of :meth:`init`.

        :func:`funcprecond.from_dict` calls this, because an empty state takes factors of any name
        and size.

        Raises:
            ValueError: a block has other parameters or another size, or a parameter has none.
        """
        shapes = self.covered if self.shapes else {}
        blocks = {**self.left, **self.right, **self.units, **self.others}
        if not shapes or not blocks:
            return
        covered = {name for block in blocks for name in split_block(block) if name}
        unknown, missing = sorted(covered - shapes.keys()), sorted(shapes.keys() - covered)
        if unknown or missing:
            msg = (
                f"the saved factors belong to another model: it has {unknown or 'no parameter'} "
                f"that this one lacks, and lacks {missing or 'none'} of this one; restore them for "
                "the model that they were saved for"
            )
            raise ValueError(msg)
        for block in blocks:
            sizes = [math.prod(shapes[name]) for name in split_block(block) if name]
            found, fits = self._restored_size(block, shapes[split_block(block)[0]], sum(sizes))
            if not fits:
                expected = {name: shapes[name] for name in split_block(block) if name}
                msg = (
                    f"the saved curvature of {block!r} is for {found}, but the parameters have the "
                    f"shapes {expected}: restore it for the model that it was saved for"
                )
                raise ValueError(msg)

    def _restored_size(self, block: str, shape: tuple[int, ...], count: int) -> tuple[str, bool]:
        """What the curvature of a block is for, and whether that is ``count`` entries.

        Args:
            block: the name of the block.
            shape: the shape of its first parameter.
            count: the number of entries of all its parameters.

        Returns:
            A description of the saved curvature, and whether it fits.
        """
        lead = self.normalizer.ndim  # the axes of a vmap
        if block in self.units:
            units, parts = self.units[block].shape[lead : lead + 2]
            return f"{units} units of {parts} entries", units * parts == count
        if block in self.others:
            found = tuple(self.others[block].shape[lead:])
            return f"a parameter of shape {found}", found == shape
        left, right = self.left[block], self.right[block]
        groups = max(x.shape[lead] if x.ndim == lead + 3 else 1 for x in (left, right))
        rows, columns = left.shape[-1], right.shape[-1]
        # The bias is a column, or a row of a layer whose first axis is that of its inputs.
        extra = groups * rows - shape[0]
        fits = groups * rows * columns == count and extra in (0, split_block(block)[1] is not None)
        return f"{groups} matrices of shape {(rows, columns)}", fits

    def _input_factor(self, uses: Uses, bias: bool, sharing: Sharing) -> Tensor:
        call: AffineCall = uses[0].call  # pyright: ignore[reportAssignmentType]
        if self._is_long(call.fan_in(uses[0].inputs) + bias, call):
            return call.input_diagonal(uses, bias, sharing)
        return call.input_factor(uses, bias, sharing, thin=self.thin)

    def _output_factor(self, uses: Uses, sharing: Sharing, scale: Tensor) -> Tensor:
        call: AffineCall = uses[0].call  # pyright: ignore[reportAssignmentType]
        if self._is_long(call.fan_out, call):
            return call.output_diagonal(uses, sharing, scale)
        return call.output_factor(uses, sharing, scale, thin=self.thin)

    def _is_long(self, length: int, call: AffineCall) -> bool:
        return 0 < self.max_dim < length and call.groups == 1

    def _tied_factors(self, uses: Uses, sharing: Sharing, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of a table that is used both as an embedding and as a linear layer.

        The curvature of each use is approximated by ``diag ⊗ right``: of the second moments of the
        linear layer's output gradients, which have one entry per token, only the diagonal is kept.
        The curvature between the two uses is left out. The result is the Kronecker product nearest
        to the sum of both.
        """
        looked_up = tuple(use for use in uses if use.call.one_hot)
        applied = tuple(use for use in uses if not use.call.one_hot)
        squares = applied[0].call.output_diagonal(applied, sharing, scale)
        frequencies = self._input_factor(looked_up, False, sharing)
        return nearest_kronecker(
            [frequencies.to(squares.dtype), squares],
            [
                dataclasses.replace(self, thin=False)._output_factor(looked_up, sharing, scale),
                dataclasses.replace(self, thin=False)._input_factor(applied, False, sharing),
            ],
        )


def _joined(a: Tensor, b: Tensor) -> Tensor:
    """The sum of two factors, which stays thin if it has fewer rows than columns."""
    if a.ndim == 1:
        return a + b
    if a.shape[-2] + b.shape[-2] < a.shape[-1]:
        return torch.cat([a, b], -2)
    a = square(a)
    return torch.addmm(a, b.mT, b) if b.ndim == 2 and is_thin(b) else a + square(b)


def _are_tied(uses: Uses) -> bool:
    return len({type(use.call) for use in uses}) > 1
