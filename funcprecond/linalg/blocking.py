"""How a parameter becomes the tensors that the axis methods precondition.

Axes of length 1 carry nothing and are dropped; small neighbouring axes can be merged, so that the
3 x 3 kernel of a convolution is not two tiny factors; and long axes can be cut into blocks, each
preconditioned as if it were a parameter of its own, which bounds the cost of a factor.
:func:`in_blocks` does that to any method.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from funcprecond.evidence import Evidence
from funcprecond.transform import Transform
from funcprecond.tree import Params

__all__ = ["Blocking", "in_blocks", "merged"]


@dataclasses.dataclass(frozen=True)
class Blocking:
    """The layout of every parameter, from its shape alone.

    Attributes:
        merge: neighbouring axes are multiplied together while their product is at most this; 0 for
            never.
        block: longer axes are cut into pieces of this length, the last one shorter; 0 for never.
        max_dim: longer axes, after that, have no factor: the identity stands for it; 0 for no
            limit.
    """

    merge: int = 0
    block: int = 0
    max_dim: int = 0

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 0:
                msg = f"{name} must be a length, or 0 for none, not {value}"
                raise ValueError(msg)

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The parameter's shape after dropping and merging axes."""
        kept = [n for n in shape if n != 1]
        return tuple(merged(kept, self.merge)) if self.merge else tuple(kept)

    def axes(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The axes of a block that have a factor."""
        return tuple(i for i, n in enumerate(shape) if not self.max_dim or n <= self.max_dim)

    def has_factors(self, shape: Sequence[int]) -> bool:
        """Whether a parameter of this shape has any factor.

        Vectors and scalars have none, and neither has a parameter all of whose axes are too long:
        the diagonal of the second moment stands in.
        """
        view = self.shape(shape)
        pieces = [min(n, self.block) if self.block else n for n in view]
        return 0 not in view and len(view) > 1 and len(self.axes(pieces)) > 0

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The parameter's blocks by name: its own, with the block's place if there are several."""
        view = tensor.reshape(self.shape(tensor.shape))
        places = self._places(view.shape)
        if len(places) == 1:
            return {name: view}
        return {f"{name}[{key}]": view[place] for key, place in places.items()}

    def join(self, name: str, blocks: dict[str, Tensor], like: Tensor) -> Tensor:
        """The inverse of :meth:`split`, shaped like ``like``."""
        shape = self.shape(like.shape)
        places = self._places(shape)
        if len(places) == 1:
            return blocks[name].reshape(like.shape)
        rows = iter([blocks[f"{name}[{key}]"] for key in places])
        counts = [len(self._pieces(n)) for n in shape]
        return _assemble(rows, counts, 0).reshape(like.shape)

    def _pieces(self, n: int) -> list[slice]:
        step = self.block if self.block and n > self.block else max(n, 1)
        return [slice(i, min(i + step, n)) for i in range(0, max(n, 1), step)]

    def _places(self, shape: Sequence[int]) -> dict[str, tuple[slice, ...]]:
        pieces = [list(enumerate(self._pieces(n))) for n in shape]
        return {
            ",".join(str(i) for i, _ in place): tuple(s for _, s in place)
            for place in itertools.product(*pieces)
        }


def in_blocks(inner: Transform, blocking: Blocking) -> Transform:
    """A method on the blocks of parameters with at least two axes, as if they were parameters.

    Args:
        inner: a method that looks at the gradient and its intervals only. Its state is by block.
        blocking: the layout; ``max_dim`` is left to the method.
    """

    def split(params: Params) -> Params:
        blocks = {}
        for name, p in params.items():
            blocks |= blocking.split(name, p) if blocking.has_factors(p.shape) else {name: p}
        return blocks

    def update(state, grads: Params, evidence: Evidence | None = None):
        state, found = inner.update(state, split(grads), evidence)
        direction = {
            k: blocking.join(k, found, g) if blocking.has_factors(g.shape) else found[k]
            for k, g in grads.items()
        }
        return state, direction

    return Transform(lambda params: inner.init(split(params)), update, inner.needs)


def merged(shape: Sequence[int], limit: int) -> list[int]:
    """Neighbouring axes multiplied together, from left to right, while the product is within limit.

    ``[1, 2, 512, 1, 2048, 1, 3, 4]`` with 1024 is ``[1024, 2048, 12]``.
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


def _assemble(blocks, counts: Sequence[int], axis: int) -> Tensor:

    parts = [
        next(blocks) if axis == len(counts) - 1 else _assemble(blocks, counts, axis + 1)
        for _ in range(counts[axis])
    ]
    return torch.cat(parts, axis) if len(parts) > 1 else parts[0]
