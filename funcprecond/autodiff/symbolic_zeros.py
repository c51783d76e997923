"""A pull-back of zeros, of which nothing is computed but its graph.

``J^T u`` is linear in ``u``, so that the graph of one pull-back of any ``u``, pulled back in its
turn, is ``J``: at zero no number in it is needed. Every tensor in it that is known to be zero is a
view of one entry, and so is what an operation makes of one that it is linear in. An operation that
is not known here is computed as ever.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["SymbolicZeros"]


def _like_first(g: Tensor, *_) -> Sequence[int]:
    return g.shape


def _like_second(g: Tensor, x: Tensor, *_) -> Sequence[int]:
    return x.shape


def _broadcast(a: Tensor, b: Tensor | float) -> Sequence[int]:
    return torch.broadcast_shapes(a.shape, b.shape) if isinstance(b, Tensor) else a.shape


def _sum(g: Tensor, axes: Sequence[int] | None, keepdim: bool = False) -> Sequence[int]:
    gone = {a % g.ndim for a in axes} if axes else set(range(g.ndim))
    return [1 if i in gone else n for i, n in enumerate(g.shape) if keepdim or i not in gone]


_aten = torch.ops.aten
# What backward passes are made of: how many arguments each is linear in, one at a time, and the
# shape of its result,
_LINEAR = {
    _aten.mm.default: (2, lambda a, b: (a.shape[0], b.shape[1])),
    _aten.bmm.default: (2, lambda a, b: (*a.shape[:2], b.shape[2])),
    _aten.mul.Tensor: (2, _broadcast),
    _aten.mul.Scalar: (1, _like_first),
    _aten.div.Tensor: (1, _broadcast),
    _aten.div.Scalar: (1, _like_first),
    _aten.neg.default: (1, _like_first),
    _aten.masked_fill.Scalar: (1, _like_first),
    _aten.sum.dim_IntList: (1, _sum),
    _aten.threshold_backward.default: (1, _like_first),
    _aten.leaky_relu_backward.default: (1, _like_first),
    _aten.gelu_backward.default: (1, _like_first),
    _aten.silu_backward.default: (1, _like_first),
    _aten.tanh_backward.default: (1, _like_first),
    _aten.sigmoid_backward.default: (1, _like_first),
    _aten._softmax_backward_data.default: (1, _like_first),
    _aten.max_pool2d_with_indices_backward.default: (1, _like_second),
    _aten.avg_pool2d_backward.default: (1, _like_second),
    _aten._adaptive_avg_pool2d_backward.default: (1, _like_second),
    _aten.select_backward.default: (1, lambda g, shape, *_: shape),
    _aten.slice_backward.default: (1, lambda g, shape, *_: shape),
}
# or of each of its results, where the last argument says which are wanted.
_LINEAR_MASKED = {
    _aten.convolution_backward.default: lambda g, x, w, bias, *_: (x.shape, w.shape, bias),
    _aten.native_layer_norm_backward.default: lambda g, x, shape, *_: (x.shape, shape, shape),
    _aten.native_batch_norm_backward.default: lambda g, x, *_: (x.shape, *[x.shape[1:2]] * 2),
}
_SUMS = {_aten.add.Tensor, _aten.sub.Tensor}


class SymbolicZeros(TorchDispatchMode):
    """The mode that a pull-back of :meth:`zeros_like` happens under."""

    def __init__(self):
        super().__init__()
        # All are kept: the address of one that is gone could be another tensor's.
        self._memory: list[Tensor] = []

    def zeros_like(self, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Zeros like a tensor, or of another shape: of a plain tensor one entry in memory."""
        if type(like) is not Tensor:
            return torch.zeros_like(like)
        shape = like.shape if shape is None else shape
        for zero in self._memory:
            if zero.dtype == like.dtype and zero.device == like.device:
                return zero.expand(shape)
        self._memory.append(torch.zeros((), dtype=like.dtype, device=like.device))
        return self._memory[-1].expand(shape)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _LINEAR:
            places, shape = _LINEAR[func]
            if any(map(self._is_zero, args[:places])) and not kwargs and _keeps_dtype(*args):
                return self.zeros_like(args[0], shape(*args))
        elif func in _LINEAR_MASKED and self._is_zero(args[0]):
            shapes = zip(_LINEAR_MASKED[func](*args), args[-1], strict=True)
            return tuple(self.zeros_like(args[0], s) if wanted else None for s, wanted in shapes)
        elif func in _SUMS and not kwargs and all(map(self._is_zero, args)) and _keeps_dtype(*args):
            return self.zeros_like(args[0], _broadcast(*args))
        elif func is _aten.stack.default and all(map(self._is_zero, args[0])):
            like = args[0][0]
            axis = args[1] % (like.ndim + 1) if len(args) > 1 else 0
            return self.zeros_like(like, (*like.shape[:axis], len(args[0]), *like.shape[axis:]))
        elif _writes(func) and self._is_zero(args[0]):
            # What is linear in zero is zero, whatever is written.
            return args[0]
        return func(*args, **(kwargs or {}))

    def _is_zero(self, x: Tensor) -> bool:
        if type(x) is not Tensor:
            return False
        address = x.data_ptr()
        return any(address == zeros.data_ptr() for zeros in self._memory)


def _writes(func) -> bool:
    return func._schema.is_mutable and torch.Tag.inplace_view not in func.tags


def _keeps_dtype(first: Tensor, *rest: Any) -> bool:
    if rest and isinstance(rest[0], (Tensor, complex)):
        return torch.result_type(first, rest[0]) == first.dtype
    return True
