"""Whether a gradient is still the one that was measured.

Some measurements describe the gradient of the run, such as its rows, of which it is the sum. A
method may use them in the place of the gradient only if it is given this gradient. Between
``fp.observe`` and ``opt.update`` it may have been clipped, or averaged over processes, in place.
"""

import torch
from torch import Tensor

from funcprecond.tracing import is_traced
from funcprecond.tree import Params

__all__ = ["Origin", "recorded", "trusted"]


class Origin:
    """The tensors of a gradient as it was measured, and how often each had been written to.

    All origins are equal, because they are not part of the structure of a tree.

    Args:
        grads: the gradient.
        versions: torch's counts of the writes to each tensor; None if nobody can write to them.
    """

    def __init__(self, grads: Params, versions: dict[str, int] | None = None):
        # A dict of its own, because the one of the evidence may be given other tensors.
        self._grads, self._versions = dict(grads), versions

    def holds(self, grads: Params) -> bool:
        """Whether these are the tensors of the measured gradient, or some of them, unchanged.

        Writes that torch does not count are not noticed: those to ``x.data``, and those of NumPy
        or other libraries that share the memory. Collectives are not counted either, so where
        processes communicate the answer is False.

        Args:
            grads: the gradient that ``update`` was given.
        """
        own = self._grads
        if not all(k in own and g is own[k] for k, g in grads.items()):
            return False
        if self._versions is None:
            return True
        if is_traced() or _processes_communicate():
            return False
        return all(g._version == self._versions[k] for k, g in grads.items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin)

    def __hash__(self) -> int:
        return 0

    def __reduce__(self):
        # The tensors of a copy have counts of their own.
        return Origin, ({},)


def recorded(grads: Params) -> Origin | None:
    """The origin of a gradient that has just been measured, in code that may write to it.

    Traced code cannot see writes, so that it gets None.
    """
    if is_traced() or any(map(Tensor.is_inference, grads.values())):
        return None
    return Origin(grads, {k: g._version for k, g in grads.items()})


def trusted(grads: Params) -> Origin:
    """The origin of a gradient that goes straight into an update, which is pure."""
    return Origin(grads)


def _processes_communicate() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
