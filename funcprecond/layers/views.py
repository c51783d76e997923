"""Tensors of a run whose entries are those of a parameter: transposes, parts, rows of a table.

Many models do not pass a parameter to a layer as it is stored. They transpose or reshape it, cast
it, multiply it by a constant, take one of several experts, or look up some of its rows. The
gradient in the parameter follows from the gradient in such a *view*, so that a layer that uses the
view is a layer that uses the parameter. This file knows which functions of torch make a view of a
view; :mod:`funcprecond.autodiff.layer_recorder` keeps track of the tensors.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "CONSTANTS",
    "LOOKUPS",
    "VIEWS",
    "Lookup",
    "View",
    "as_lookup",
    "has_constant",
    "looked_up",
    "viewed",
]


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A tensor with all entries of a parameter, or those of a part of it, in another arrangement.

    Attributes:
        name: the name of the parameter.
        sizes: the lengths of its axes; if the view is a part, that of the part.
        axes: for each axis of the view, the axes of the parameter that are merged into it.
        factor: the number or 0-d tensor by which the entries are multiplied.
        shifted: whether a constant is added to the entries.
        part: if the view is a part along axis 0 of the parameter, the index of its first entry and
            the length of the whole axis.
        index: if the view is one entry along axis 0, its index. ``axes`` does not contain 0 then.
    """

    name: str
    sizes: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    factor: Any = 1
    shifted: bool = False
    part: tuple[int, int] | None = None
    index: int | None = None

    @classmethod
    def of(cls, name: str, parameter: Tensor) -> "View":
        """The view that is the parameter itself."""
        return cls(name, tuple(parameter.shape), tuple((k,) for k in range(parameter.ndim)))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the view."""
        return tuple([math.prod([self.sizes[k] for k in merged]) for merged in self.axes])

    @property
    def is_whole(self) -> bool:
        """Whether the view has all entries of the parameter."""
        return self.part is None and self.index is None

    @property
    def is_parameter(self) -> bool:
        """Whether the view equals the parameter, in another dtype at most."""
        return (
            self.is_linear
            and self.is_whole
            and self.order == tuple(range(len(self.sizes)))
            and self.shape == self.sizes
        )

    @property
    def is_linear(self) -> bool:
        """Whether the entries are those of the parameter, without a factor or a shift."""
        return not self.shifted and not isinstance(self.factor, Tensor) and self.factor == 1

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of the parameter, in the order in which the view has them."""
        return tuple(k for merged in self.axes for k in merged)

    def is_in_order(self, axes: Sequence[int] | None = None) -> bool:
        """Whether axes of the view, all by default, follow each other as in the parameter.

        Axes of length 1 may be anywhere, because they change nothing about the order of entries.
        """
        chosen = self.axes if axes is None else [self.axes[a] for a in axes]
        order = [k for merged in chosen for k in merged if self.sizes[k] != 1]
        return order == sorted(order)

    def is_transposed(self) -> bool | None:
        """Whether a view of two axes is the transpose of how the parameter is stored.

        Returns:
            True or False; None if it is neither the stored matrix nor its transpose.
        """
        if self.order == tuple(sorted(self.order)):
            return False
        last, first = self.axes
        if (*first, *last) == tuple(sorted(self.order)):
            return True
        return False if self.is_in_order() else True if self.is_in_order([1, 0]) else None


@dataclasses.dataclass(frozen=True, eq=False)
class Lookup:
    """A tensor made of rows of a table, which is a parameter of the shape (*lead, d).

    Attributes:
        name: the name of the parameter.
        ids: the indices of the rows, shaped like the tensor without its last axis.
        rows: the number of rows of the table.
        padding: the row that gets no gradient, or None.
    """

    name: str
    ids: Tensor
    rows: int
    padding: int | None = None


# ------------------------------------------------------------------------------- views of views
def _spelled(*names: str) -> list[Callable[..., Any]]:
    """The functions with these names, as functions of torch and as methods of a tensor."""
    places = (torch, torch.Tensor)
    return [getattr(place, name) for name in names for place in places if hasattr(place, name)]


def _getters(*names: str) -> list[Callable[..., Any]]:
    return [getattr(torch.Tensor, name).__get__ for name in names]


_KEPT = {
    *_spelled("clone", "contiguous", "positive"),
    *_spelled("to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda"),
}
_RESHAPES = {
    *_spelled("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel"),
    *_spelled("view_as", "reshape_as"),
}
_SWAPS = {*_spelled("transpose", "swapaxes", "swapdims")}
_LAST_SWAPS = {*_spelled("adjoint"), *_getters("mT", "mH")}
_REVERSALS = {*_spelled("t"), *_getters("T", "H")}
_PERMUTES = {*_spelled("permute")}
_MOVES = {*_spelled("movedim", "moveaxis")}
_PIECES = {*_spelled("chunk", "split", "tensor_split", "unbind", "narrow", "select")}
_ITEM = torch.Tensor.__getitem__
_PRODUCTS = {*_spelled("mul", "multiply"), torch.Tensor.__mul__, torch.Tensor.__rmul__}
_QUOTIENTS = {*_spelled("div", "divide", "true_divide"), torch.Tensor.__truediv__}
_NEGATIONS = {*_spelled("neg", "negative"), torch.Tensor.__neg__}
_SUMS = {*_spelled("add"), torch.Tensor.__add__, torch.Tensor.__radd__}
_DIFFERENCES = {*_spelled("sub", "subtract"), torch.Tensor.__sub__}
_REVERSED = {*_spelled("rsub"), torch.Tensor.__rsub__}
CONSTANTS = {*_PRODUCTS, *_QUOTIENTS, *_NEGATIONS, *_SUMS, *_DIFFERENCES, *_REVERSED}
"""The functions that multiply by something or add it, which makes a view if it is a number."""
VIEWS = {
    *_KEPT,
    *_RESHAPES,
    *_SWAPS,
    *_LAST_SWAPS,
    *_REVERSALS,
    *_PERMUTES,
    *_MOVES,
    *_PIECES,
    _ITEM,
    *CONSTANTS,
}
"""The functions that may make views of a view."""


def viewed(
    func: Callable[..., Any],
    view: View,
    tensor: Tensor,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    out: Any,
) -> View | list[View | None] | None:
    """What a function makes of a view.

    Args:
        func: one of :data:`VIEWS`.
        view: the view among its arguments.
        tensor: the tensor that is this view.
        args, kwargs: its arguments.
        out: its result.

    Returns:
        The view that the result is, or a list if the result is a tuple of tensors; None for
        anything that is no view.
    """
    if func is _ITEM and isinstance(out, Tensor) and _is_reshape(args[1]):
        axes = _merged(view, tuple(out.shape))
        return None if axes is None else dataclasses.replace(view, axes=axes)
    if func in _PIECES or func is _ITEM:
        return _pieces(func, view, args, kwargs, out)
    if not isinstance(out, Tensor):
        return None
    shape = tuple(out.shape)
    if func in _KEPT or func in CONSTANTS:
        kept = view if func in _KEPT else _with_constant(func, view, tensor, args)
        return kept if shape == view.shape else None
    if func in _RESHAPES:
        axes = _merged(view, shape)
    else:
        order = permutation(func, len(view.axes), args[1:], kwargs)
        axes = None if order is None else tuple(view.axes[a] for a in order)
    return None if axes is None else dataclasses.replace(view, axes=axes)


def permutation(
    func: Callable[..., Any], ndim: int, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[int, ...] | None:
    """The order in which a function that exchanges axes has them; None for other functions."""
    axes = list(range(ndim))
    if func in _REVERSALS:
        return tuple(reversed(axes))
    if func in _LAST_SWAPS:
        return (*axes[:-2], *reversed(axes[-2:]))
    given = [*args, *kwargs.values()]
    if func in _SWAPS:
        first, second = given
        axes[first], axes[second] = axes[second], axes[first]
        return tuple(axes)
    if func in _PERMUTES:
        dims = given[0] if isinstance(given[0], (tuple, list)) else given
        return tuple(d % ndim for d in dims)
    if func in _MOVES:
        return _moved(ndim, *given)
    return None


def _moved(ndim: int, source: Any, destination: Any) -> tuple[int, ...]:
    sources = [s % ndim for s in (source if isinstance(source, (tuple, list)) else [source])]
    places = [
        d % ndim for d in (destination if isinstance(destination, (tuple, list)) else [destination])
    ]
    found = dict(zip(places, sources, strict=True))
    rest = iter(a for a in range(ndim) if a not in sources)
    return tuple(found[a] if a in found else next(rest) for a in range(ndim))


def _merged(view: View, shape: Sequence[int]) -> tuple[tuple[int, ...], ...] | None:
    """The axes of a reshaped view; None if an axis of the parameter would be divided."""
    rest = list(view.order)
    axes = []
    for length in shape:
        own, size = [], 1
        while size < length and rest:
            own.append(rest.pop(0))
            size *= view.sizes[own[-1]]
        if size != length:
            return None
        axes.append(own)
    if any(view.sizes[k] != 1 for k in rest):
        return None
    if axes:
        axes[-1] += rest
    return tuple(map(tuple, axes))


def has_constant(
    func: Callable[..., Any], tensor: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Whether a function of :data:`CONSTANTS` only adds a number to a view or multiplies by it."""
    if func in _NEGATIONS:
        return True
    if kwargs or len(args) != 2 or (func in _QUOTIENTS and args[0] is not tensor):
        return False
    other = args[1] if args[0] is tensor else args[0]
    return not isinstance(other, Tensor) or (other.ndim == 0 and not other.requires_grad)


def _with_constant(func, view, tensor, args) -> View:
    if func in _NEGATIONS:
        return dataclasses.replace(view, factor=-view.factor)
    if func in _SUMS:
        return dataclasses.replace(view, shifted=True)
    if func in _DIFFERENCES or func in _REVERSED:
        negative = (func in _REVERSED) == (args[0] is tensor)
        return dataclasses.replace(
            view, shifted=True, factor=-view.factor if negative else view.factor
        )
    constant = args[1] if args[0] is tensor else args[0]
    factor = view.factor / constant if func in _QUOTIENTS else view.factor * constant
    return dataclasses.replace(view, factor=factor)


def _is_reshape(item: Any) -> bool:
    """Whether ``x[item]`` has all entries of x, with axes of length 1 more at most."""
    items = item if isinstance(item, tuple) else (item,)
    return all(
        x is None or x is Ellipsis or (isinstance(x, slice) and x == slice(None)) for x in items
    )


def _pieces(func, view, args, kwargs, out) -> View | list[View | None] | None:
    """Parts of a view along axis 0 of the parameter."""
    if not view.is_whole or not view.axes or view.axes[0] != (0,):
        return None
    total = view.sizes[0]

    def part(start: int, length: int) -> View:
        sizes = (length, *view.sizes[1:])
        return dataclasses.replace(view, sizes=sizes, part=(start, total))

    def entry(i: int) -> View:
        return dataclasses.replace(view, axes=view.axes[1:], index=i % total)

    if func is _ITEM:
        item = args[1]
        if isinstance(item, tuple) and len(item) == 1:
            (item,) = item
        if isinstance(item, slice) and item.step in (None, 1) and isinstance(out, Tensor):
            start, stop, _ = item.indices(total)
            return part(start, max(stop - start, 0))
        if isinstance(item, Tensor) and item.ndim == 0 and not item.is_floating_point():
            item = _number(item)
        return entry(item) if isinstance(item, int) and not isinstance(item, bool) else None
    names = {"narrow": 1, "select": 1, "unbind": 1}
    name = func.__name__
    axis = kwargs.get("dim", args[names.get(name, 2)] if len(args) > names.get(name, 2) else 0)
    if axis % len(view.axes):
        return None
    if name == "narrow":
        start = kwargs.get("start", args[2] if len(args) > 2 else None)
        start = _number(start) if isinstance(start, Tensor) else start
        return None if start is None else part(start % total, out.shape[0])
    if name == "select":
        index = kwargs.get("index", args[2] if len(args) > 2 else None)
        index = _number(index) if isinstance(index, Tensor) else index
        return None if index is None else entry(index)
    if name == "unbind":
        return [entry(i) for i in range(total)]
    found, start = [], 0
    for piece in out:
        found.append(part(start, piece.shape[0]))
        start += piece.shape[0]
    return found


def _number(x: Tensor) -> int | None:
    """The value of a 0-d tensor; None where it cannot be read, as under a transform."""
    if torch.compiler.is_compiling():
        return None
    try:
        return int(x)
    except RuntimeError:
        return None


# -------------------------------------------------------------------------- rows of a table
_EXPANSIONS = {*_spelled("expand", "expand_as", "broadcast_to")}
_REPEATS = {torch.Tensor.repeat}
_SELECTIONS = {*_spelled("index_select")}
_KEPT_ROWS = _KEPT | _RESHAPES | _SWAPS | _LAST_SWAPS | _REVERSALS | _PERMUTES | _MOVES
LOOKUPS = {F.embedding, *_EXPANSIONS, *_REPEATS, *_SELECTIONS, _ITEM, *_KEPT_ROWS}
"""The functions that may look up rows of a table, or arrange rows that were looked up."""


def looked_up(
    func: Callable[..., Any],
    source: View | Lookup,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    out: Any,
) -> Lookup | None:
    """The rows of a table that the result of a function consists of.

    Args:
        func: one of :data:`LOOKUPS`.
        source: the table, or rows that were looked up before, which is the first argument of the
            function (the second of ``F.embedding``).
        args, kwargs: its arguments.
        out: its result.

    Returns:
        The rows, or None if the result is something else.
    """
    if func is F.embedding:
        return _embedded(source, args, kwargs)
    rows = source if isinstance(source, Lookup) else None
    if isinstance(source, View) and func not in _KEPT_ROWS:
        rows = as_lookup(source, args[0])
    if rows is None or not isinstance(out, Tensor) or not out.ndim:
        return None
    ids = _ids(func, rows.ids, args, kwargs, out)
    fits = ids is not None and ids.shape == out.shape[:-1]
    return dataclasses.replace(rows, ids=ids) if fits else None


def as_lookup(view: View, tensor: Tensor) -> Lookup | None:
    """The rows of a table that a view consists of; None if it is no table.

    Args:
        view: what the tensor is.
        tensor: the tensor.
    """
    is_table = (
        view.is_linear
        and view.axes
        and view.is_in_order()
        and view.axes[-1][-1:] == (len(view.sizes) - 1,)
        and view.shape[-1] == view.sizes[-1]
    )
    if not is_table:
        return None
    lead, per_entry = view.shape[:-1], math.prod(view.sizes[1:-1])
    # A vector is one row.
    whole = (0, 1) if len(view.sizes) == 1 else (view.index or 0, view.sizes[0])
    start, entries = view.part or whole
    ids = torch.arange(math.prod(lead), device=tensor.device).reshape(lead)
    return Lookup(view.name, ids + start * per_entry, entries * per_entry)


def _embedded(source, args, kwargs) -> Lookup | None:
    """The rows that ``F.embedding`` looks up."""
    ids, padding = args[0], args[2] if len(args) > 2 else kwargs.get("padding_idx")
    if source.is_parameter and len(source.sizes) == 2:
        found = Lookup(source.name, ids, source.sizes[0])
    else:
        found = as_lookup(source, args[1])
        if found is None or found.ids.ndim != 1:
            return None
        padding = None if padding is None else int(found.ids[padding])
        found = dataclasses.replace(found, ids=found.ids[ids])
    return dataclasses.replace(found, padding=None if padding is None else padding % found.rows)


def _ids(func, ids, args, kwargs, out) -> Tensor | None:
    rest = args[1:]
    if func in _EXPANSIONS:
        return ids.expand(out.shape[:-1])
    if func in _REPEATS:
        counts = rest[0] if isinstance(rest[0], (tuple, list)) else rest
        return ids.repeat(*counts[:-1]) if counts[-1] == 1 else None
    if func in _SELECTIONS:
        axis, index = kwargs.get("dim", rest[0]), kwargs.get("index", rest[-1])
        return ids.index_select(axis, index) if axis % out.ndim < ids.ndim else None
    if func is _ITEM:
        return _item(ids, rest[0])
    if func in _KEPT:
        return ids
    if func in _RESHAPES:
        return ids.reshape(out.shape[:-1]) if ids.numel() == out.shape[:-1].numel() else None
    order = permutation(func, ids.ndim + 1, rest, kwargs)
    return ids.permute(order[:-1]) if order and order[-1] == ids.ndim else None


def _item(ids: Tensor, item: Any) -> Tensor | None:
    """The indices of the rows in ``table[item]``, if the item leaves the last axis as it is."""
    items = item if isinstance(item, tuple) else (item,)
    if any(isinstance(x, Tensor) and x.dtype == torch.bool for x in items):
        return None
    taken = sum(x is not None and x is not Ellipsis for x in items)
    has_ellipsis = any(x is Ellipsis for x in items[:-1])
    if has_ellipsis or taken > ids.ndim:
        # The last item belongs to the last axis, of which all entries must be taken.
        *items, last = items
        if not (isinstance(last, slice) and last == slice(None)):
            return None
    return ids[tuple(items)]
