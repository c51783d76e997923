"""The layout of a parameter: how it is divided into blocks with one factor per axis.

Axes of length 1 carry no information and are dropped. Small neighboring axes can be merged, so that
the 3 x 3 kernel of a convolution does not have two tiny factors. Long axes can be cut into blocks,
each of which is preconditioned as if it were a parameter of its own; this bounds the cost of a
factor. :func:`funcprecond.transforms.in_blocks.in_blocks` applies a layout to any method.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from funcprecond.checks import at_least, one_of

__all__ = ["Blocking", "Side", "merged"]

Shape = tuple[int, ...]
Side = Literal["all", "shortest", "first", "last"]


class _Layout(NamedTuple):
    """The layout of parameters of one shape.

    Attributes:
        view: the shape after dropping and merging axes.
        places: the slices of each block, by its place, such as "0,1"; None for a single block.
        counts: the number of blocks along each axis of the view.
        has_factors: whether any block has a factor.
    """

    view: Shape
    places: Mapping[str, tuple[slice, ...]] | None
    counts: Shape
    has_factors: bool


@dataclasses.dataclass(frozen=True)
class Blocking:
    """The layout of every parameter, from its shape alone.

    Attributes:
        merge: neighboring axes are merged while the product of their lengths is at most this; 0
            means never.
        block: longer axes are cut into pieces of this length, of which the last may be shorter; 0
            means never.
        max_dim: an axis that is longer than this after cutting has no factor, and the identity
            takes its place; 0 means no limit.
        side: which axes of a block have a factor: "all" of them, or only the "shortest", the
            "first" or the "last".

    Raises:
        ValueError: a number is negative, or ``side`` is none of these.
    """

    merge: int = 0
    block: int = 0
    max_dim: int = 0
    side: Side = "all"

    def __post_init__(self):
        at_least(0, merge=self.merge, block=self.block, max_dim=self.max_dim)
        one_of(("all", "shortest", "first", "last"), side=self.side)

    def shape(self, shape: Sequence[int]) -> Shape:
        """The parameter's shape after dropping and merging axes."""
        return self._layout(shape).view

    def axes(self, shape: Sequence[int]) -> Shape:
        """The axes of a block of this shape that have a factor."""
        axes = tuple(i for i, n in enumerate(shape) if not self.max_dim or n <= self.max_dim)
        if self.side == "all" or not axes:
            return axes
        if self.side == "shortest":
            return (min(axes, key=lambda i: shape[i]),)
        return axes[:1] if self.side == "first" else axes[-1:]

    def has_factors(self, shape: Sequence[int]) -> bool:
        """Whether a parameter of this shape has any factor.

        A vector or a scalar has none, and neither has a parameter whose axes are all too long. The
        diagonal of the second moment takes their place.
        """
        return self._layout(shape).has_factors

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The blocks of a parameter: ``name`` for a single block, otherwise ``name[place]``."""
        layout = self._layout(tensor.shape)
        view = tensor if layout.view == tensor.shape else tensor.reshape(layout.view)
        if layout.places is None:
            return {name: view}
        return {f"{name}[{key}]": view[place] for key, place in layout.places.items()}

    def join(self, name: str, blocks: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """The inverse of :meth:`split`, shaped like ``like``."""
        layout = self._layout(like.shape)
        if layout.places is None:
            return blocks[name].reshape(like.shape)
        parts = iter([blocks[f"{name}[{key}]"] for key in layout.places])
        return _assembled(parts, layout.counts, 0).reshape(like.shape)

    def _layout(self, shape: Sequence[int]) -> _Layout:
        # Layouts are cached because every step uses them; a compiler traces this only once anyway.
        of = _layout.__wrapped__ if torch.compiler.is_compiling() else _layout
        return of(self, tuple(shape))


@functools.lru_cache(maxsize=4096)
def _layout(blocking: Blocking, shape: Shape) -> _Layout:
    kept = [n for n in shape if n != 1]
    view = tuple(merged(kept, blocking.merge)) if blocking.merge else tuple(kept)
    pieces = [list(enumerate(_pieces(n, blocking.block))) for n in view]
    counts = tuple(len(p) for p in pieces)
    places = None
    if math.prod(counts) != 1:
        places = {
            ",".join(str(i) for i, _ in place): tuple(s for _, s in place)
            for place in itertools.product(*pieces)
        }
    lengths = [min(n, blocking.block) if blocking.block else n for n in view]
    has_factors = 0 not in view and len(view) > 1 and len(blocking.axes(lengths)) > 0
    return _Layout(view, places, counts, has_factors)


def _pieces(n: int, block: int) -> list[slice]:
    step = block if block and n > block else max(n, 1)
    return [slice(i, min(i + step, n)) for i in range(0, max(n, 1), step)]


def merged(shape: Sequence[int], limit: int) -> list[int]:
    """The shape with neighboring axes merged, from left to right, up to a product of ``limit``.

    ``[1, 2, 512, 1, 2048, 1, 3, 4]`` with the limit 1024 becomes ``[1024, 2048, 12]``.
    """
    result: list[int] = []
    for n in shape:
        if n == 1:
            continue
        if result and result[-1] * n <= limit:
            result[-1] *= n
        else:
            result.append(n)
    return result or [math.prod(shape)]


def _assembled(parts: Iterator[Tensor], counts: Sequence[int], axis: int) -> Tensor:
    inner = axis + 1 < len(counts)
    along = [
        _assembled(parts, counts, axis + 1) if inner else next(parts) for _ in range(counts[axis])
    ]
    return torch.cat(along, axis) if len(along) > 1 else along[0]
