"""Layer-wise Kronecker factors of the Fisher matrix: output gradients ⊗ inputs.

The block of a layer is approximated by ``left ⊗ right``, with one factor for each axis of its
matrix ``[W | b]``. For a linear layer of shape (o, i + 1) the factors are second moments:
``left = scale Σ g g^T`` of the output gradients, and ``right = mean [a, 1] [a, 1]^T`` of the
inputs. Only their product has a meaning; it is in units of the loss.
"""

import dataclasses
import itertools
import math
import operator
import warnings
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcprecond.checks import listed
from funcprecond.layers.block_matrix import split
from funcprecond.layers.blocks import Layers, split_block
from funcprecond.layers.kinds.affine import AffineCall
from funcprecond.layers.kinds.linear import Linear
from funcprecond.layers.kinds.scale import Scale
from funcprecond.layers.layer_call import LayerUse, Sharing
from funcprecond.linalg.gram import is_thin, square
from funcprecond.linalg.nearest_kronecker import nearest_kronecker
from funcprecond.linalg.treemath import scalar_like
from funcprecond.representation.average import (
    Decay,
    Present,
    accumulate,
    divisor,
    normalizer_after,
    present,
    separated,
)
from funcprecond.tracing import is_traced
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
        normalizer: 0-d, see :mod:`funcprecond.representation.average`. It belongs to all blocks
            without a normalizer of their own.
        names: the names of the parameters that this state covers.
        shapes: their shapes, with which a restored state is checked; empty if they are not known.
        thin: store a factor of a local measurement (``decay=None``) as X, (r, n), if it is
            ``X^T X`` with r < n.
        max_dim: of a factor for a longer axis, only the diagonal is measured and stored, (o,) or
            (i + 1,); 0 means no limit. The limit does not apply to a convolution of several groups,
            whose factors are small.
        normalizers: the normalizers of the blocks that some measurements left out, such as an
            expert without tokens: each block is the average of the measurements that have it. A
            parameter that was in none so far has the normalizer 0.
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
    normalizers: dict[str, Tensor] = dataclasses.field(default_factory=dict)

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
            The new representation. Costs one Gram matrix per factor. A block that the measurement
            lacks stays as it is. Of a parameter that batches use in different ways, such as in a
            layer and outside of layers, only the diagonal is kept.
        """
        value = value.restrict(self.names)
        thin = self.thin and decay is None
        empty = KroneckerIO(
            {}, {}, {}, {}, self.normalizer, self.names, thin, self.max_dim, self.shapes
        )
        new = empty.with_cotangents(value).with_inputs(value.uses, value.sharing)
        old, new = self._comparable(new)
        own = old.normalizers if old.blocks == new.blocks else old._separated(new.blocks)
        shared = present(old.normalizer, decay)
        now: dict[str, Present] = {k: present(own[k], decay) for k in new.blocks if k in own}
        share = any(k not in own for k in new.blocks)

        def merge(before: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
            return before | {
                k: accumulate(before.get(k), x, now.get(k, shared)) for k, x in found.items()
            }

        return dataclasses.replace(
            old,
            left=merge(old.left, new.left),
            right=merge(old.right, new.right),
            units=merge(old.units, new.units),
            others=merge(old.others, new.others),
            normalizer=normalizer_after(old.normalizer, shared) if share else old.normalizer,
            normalizers=own | {k: normalizer_after(own[k], x) for k, x in now.items()},
        )

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of all blocks; those of ``others`` are the names of parameters."""
        return (*self.left, *self.units, *self.others)

    def divisors(self) -> Callable[[str], Tensor]:
        """A function from a block to the number by which its totals are divided."""
        shared = divisor(self.normalizer)
        own = {k: divisor(x) for k, x in self.normalizers.items()}
        return lambda block: own.get(block, shared)

    def flattened(self, names: Collection[str]) -> "KroneckerIO":
        """Keep only the diagonal of the blocks that contain one of these parameters."""
        chosen = [b for b in (*self.left, *self.units) if not {*names}.isdisjoint(parameters(b))]
        if not chosen:
            return self
        others, normalizers = dict(self.others), dict(self.normalizers)
        for block in chosen:
            own = normalizers.pop(block, None)
            for name, d in self._diagonal(block).items():
                others[name] = d
                if own is not None:
                    normalizers[name] = own.clone()

        def kept(blocks: dict[str, Tensor]) -> dict[str, Tensor]:
            return {k: x for k, x in blocks.items() if k not in chosen}

        return dataclasses.replace(
            self,
            left=kept(self.left),
            right=kept(self.right),
            units=kept(self.units),
            others=others,
            normalizers=normalizers,
        )

    def grown(self, new: "KroneckerIO") -> "KroneckerIO":
        """The same state with the blocks of a later one, of which the new ones are empty."""
        old = self.flattened(new.others)

        def with_zeros(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
            return {k: before[k] if k in before else torch.zeros_like(x) for k, x in after.items()}

        own = old._separated(new.blocks) if new.normalizers else {}
        return dataclasses.replace(
            old,
            left=with_zeros(old.left, new.left),
            right=with_zeros(old.right, new.right),
            units=with_zeros(old.units, new.units),
            others=with_zeros(old.others, new.others),
            normalizers={
                k: own[k] if k in own else old.normalizer.clone() for k in new.normalizers
            },
        )

    def _comparable(self, new: "KroneckerIO") -> tuple["KroneckerIO", "KroneckerIO"]:
        """This state and a measurement, with each parameter in one form in both."""
        kinds = [tuple(map(list, (x.left, x.units, x.others))) for x in (self, new)]
        if kinds[0] == kinds[1] and _shapes(self.left) == _shapes(new.left):
            return self, new
        forms = {k: self._form(b) for b in self.blocks for k in parameters(b)}
        seen = {k: new._form(b) for b in new.blocks for k in parameters(b)}
        changed = {k for k, form in seen.items() if k in forms and forms[k] != form}
        if not changed:
            return self, new
        # All parameters of their blocks change with them.
        names = {k for k, form in (*forms.items(), *seen.items()) if changed & {*form[0]}}
        if not torch.compiler.is_compiling():
            for name in sorted(changed):
                msg = (
                    f"parameter {name!r} is used in different ways by different batches: only the "
                    "diagonal of its curvature is kept"
                )
                warnings.warn(msg, stacklevel=2)
        return self.flattened(names), new.flattened(names)

    def _form(self, block: str) -> tuple[tuple[str, ...], Any]:
        """The parameters of a block, and what determines the form of its curvature."""
        if block in self.left:
            # The rows of a thin factor are not part of its form.
            shapes = (self.left[block].shape, self.right[block].shape)
            return parameters(block), [(len(x), *x[:-2], x[-1]) for x in shapes]
        return parameters(block), "units" if block in self.units else "diagonal"

    def _separated(self, found: tuple[str, ...]) -> dict[str, Tensor]:
        """The normalizers of single blocks, where a measurement has others than the old ones."""
        known = self.blocks
        own = separated(self.normalizer, self.normalizers, known, found)
        blocks = {*known, *found}
        covered = {k for block in blocks for k in parameters(block)}
        unused = {k: torch.zeros_like(self.normalizer) for k in self.names if k not in covered}
        return {k: x for k, x in own.items() if k in blocks} | unused

    def _diagonal(self, block: str) -> Params:
        """The total of the diagonal of a block, shaped like its parameters."""
        like = {k: self.normalizer.expand(self.covered[k]) for k in parameters(block)}
        if block in self.units:
            parts = self.units[block].diagonal(dim1=-2, dim2=-1).unbind(-1)
            return {k: x.reshape(like[k].shape) for k, x in zip(like, parts, strict=True)}
        left, right = (_diagonal_of(x) for x in (self.left[block], self.right[block]))
        total = left.unsqueeze(-1) * right.unsqueeze(-2) / self.divisors()(block)
        return split(total, like, block)

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
        computed: dict[Any, Tensor] = {}
        for block, uses in value.uses.items():
            call = uses[0].call
            if isinstance(call, Scale):
                new = call.unit_blocks(uses, split_block(block)[1] is not None, value.scale)
                units[block] = units[block] + new if block in units else new
            elif _are_tied(uses):
                left[block], right[block] = self._tied_factors(uses, value.sharing, value.scale)
            else:
                side = right if call.inputs_first else left
                new = _once(
                    computed,
                    _identity(uses, lambda use: use.grads),
                    lambda uses=uses: self._output_factor(uses, value.sharing, value.scale),
                )
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
        computed: dict[Any, Tensor] = {}
        for block, uses in blocks.items():
            call = uses[0].call
            if isinstance(call, AffineCall) and not _are_tied(uses):
                side = left if call.inputs_first else right
                bias = split_block(block)[1] is not None
                key = _identity(uses, lambda use: use.inputs)
                side[block] = _once(
                    computed,
                    key and (key, bias),
                    lambda uses=uses, bias=bias: self._input_factor(uses, bias, sharing),
                )
        one = torch.ones_like(self.normalizer)
        return dataclasses.replace(self, left=left, right=right, normalizer=one)

    def block(self, name: str) -> Tensor:
        """The curvature of a layer as a dense matrix, in the order of its flattened ``[W | b]``.

        Args:
            name: the name of the block.

        Returns:
            (n, n) for a layer of n entries.
        """
        w = self.divisors()(name)
        left, right = (square(x) / w for x in (self.left[name], self.right[name]))
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
        covered = {k for block in (*blocks, *self.normalizers) for k in parameters(block)}
        unknown, missing = sorted(covered - shapes.keys()), sorted(shapes.keys() - covered)
        if unknown or missing:
            msg = (
                f"the saved factors belong to another model: it has {listed(unknown)} "
                f"that this one lacks, and lacks {listed(missing)} of this one; restore them for "
                "the model that they were saved for"
            )
            raise ValueError(msg)
        for block in blocks:
            sizes = [math.prod(shapes[name]) for name in parameters(block)]
            found, fits = self._restored_size(block, shapes[split_block(block)[0]], sum(sizes))
            if not fits:
                expected = {name: shapes[name] for name in parameters(block)}
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
        if split_block(block)[1] is not None:
            # The bias is a column, or a row of a layer whose first axis is that of its inputs.
            possible = [shape[0], shape[0] + 1]
        else:
            possible = itertools.accumulate((1, *shape), operator.mul)
        fits = groups * rows * columns == count and groups * rows in possible
        return f"{groups} matrices of shape {(rows, columns)}", fits

    def _input_factor(self, uses: Uses, bias: bool, sharing: Sharing) -> Tensor:
        call: AffineCall = uses[0].call  # pyright: ignore[reportAssignmentType]
        if self._is_long(call.fan_in(uses[0].inputs) + bias, call):
            return self._cast(call.input_diagonal(uses, bias, sharing))
        return self._cast(call.input_factor(uses, bias, sharing, thin=self.thin))

    def _output_factor(self, uses: Uses, sharing: Sharing, scale: Tensor) -> Tensor:
        call: AffineCall = uses[0].call  # pyright: ignore[reportAssignmentType]
        if self._is_long(call.fan_out, call):
            return self._cast(call.output_diagonal(uses, sharing, scale))
        return self._cast(call.output_factor(uses, sharing, scale, thin=self.thin))

    def _cast(self, factor: Tensor) -> Tensor:
        """The factor in the dtype of the parameters, if a layer has cast them to a smaller one."""
        return factor.to(torch.promote_types(factor.dtype, self.normalizer.dtype))

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


def _identity(uses: Uses, chosen: Callable[[LayerUse], Tensor]) -> Any:
    """What two linear layers share if they have the same rows; None if nobody can know.

    Queries, keys and values have the same inputs, and the two weights of a recurrent layer the same
    output gradients. Their factors need to be computed once.
    """
    if is_traced() or any(type(use.call) is not Linear or use.call.part for use in uses):
        return None
    rows = [(chosen(use), use.call) for use in uses]
    return tuple(
        (x.data_ptr(), x.shape, x.stride(), x.dtype, call.inner, call.shape[:-1])
        for x, call in rows
    )


def _once(computed: dict[Any, Tensor], key: Any, compute: Callable[[], Tensor]) -> Tensor:
    if key in computed:
        # A copy, because no tensor may be in a state twice.
        return computed[key].clone()
    found = compute()
    if key is not None:
        computed[key] = found
    return found


def parameters(block: str) -> tuple[str, ...]:
    """The names of the parameters of a block."""
    return tuple(name for name in split_block(block) if name)


def _shapes(factors: dict[str, Tensor]) -> list[int]:
    """The number of axes of each factor, which is one for a diagonal factor."""
    return [x.ndim for x in factors.values()]


def _diagonal_of(factor: Tensor) -> Tensor:
    if factor.ndim == 1:
        return factor
    if is_thin(factor):
        return factor.square().sum(-2)
    return factor.diagonal(dim1=-2, dim2=-1)


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
