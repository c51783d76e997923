"""A pull-back of zeros that builds its graph without computing values.

``J^T u`` is linear in ``u``, so the pull-back through the graph of ``u -> J^T u`` is ``J``, for any
``u``. At ``u = 0``, no value in this graph has to be computed. Every tensor that is known to be
zero is a view of one entry in memory. If an operation is linear in such a tensor, then its result
is such a view too. An operation that is not listed here is computed as usual.
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
# The operations of backward passes. For each: the number of its leading arguments in each of which
# it is linear, and the shape of its result.
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
# Operations that are linear in their first argument and have several results. The last argument
# says which results are wanted. For each: the shapes of the results.
_LINEAR_MASKED = {
    _aten.convolution_backward.default: lambda g, x, w, bias, *_: (x.shape, w.shape, bias),
    _aten.native_layer_norm_backward.default: lambda g, x, shape, *_: (x.shape, shape, shape),
    _aten.native_batch_norm_backward.default: lambda g, x, *_: (x.shape, *[x.shape[1:2]] * 2),
}
_SUMS = {_aten.add.Tensor, _aten.sub.Tensor}


class SymbolicZeros(TorchDispatchMode):
    """The mode for a pull-back of tensors from :meth:`zeros_like`."""

    def __init__(self):
        super().__init__()
        # All zeros are kept alive, because the address of a dead tensor may be used again.
        self._memory: list[Tensor] = []

    def zeros_like(self, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Make zeros that have only one entry in memory.

        Args:
            like: the tensor whose dtype and device the zeros have. For a subclass of Tensor,
                ordinary zeros are made.
            shape: the shape of the zeros; by default that of ``like``.

        Returns:
            The zeros.
        """
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
            # Whatever is written into a zero depends linearly on zeros, so it is zero as well.
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
