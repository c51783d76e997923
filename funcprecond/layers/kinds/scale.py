"""Element-wise scales ``z = x * w + b``, with a scale and optionally a bias for each unit.

A normalization layer applies such a scale to its normalized input, and a gain to any tensor. A unit
has so few parameters that its block of the curvature matrix is computed exactly.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funcprecond.layers.kinds.contraction import scaled
from funcprecond.layers.layer_call import FunctionCall, LayerCall, LayerUse, Names, Recognized
from funcprecond.layers.place import Place
from funcprecond.linalg.precision import factor_dtype
from funcprecond.tree import Params

__all__ = ["Scale", "aligned_shape"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale(LayerCall):
    """A use of a scale, and optionally a bias.

    Attributes:
        aligned: the shape of the weight as it is broadcast to the last axes of the output: (d,) for
            a scale of the last axis, (C, 1, 1) for one of the channels of images, () for a number.
    """

    aligned: tuple[int, ...] = ()

    needs_examples: ClassVar[bool] = True
    functions = (
        *(F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm, F.instance_norm),
        *(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__),
    )

    @classmethod
    def recognize(cls, call: FunctionCall, names: Names) -> list[Recognized]:
        if call.function not in _NORMS:
            return cls._of_product(call, names)
        scale, bias, trailing, normalize = _NORMS[call.function](call)
        weight, x = names.of(scale), call.argument(0, "input")
        if not weight or x.ndim <= trailing:
            return []
        shape = tuple(scale.shape) if trailing else (*scale.shape, *[1] * (x.ndim - 2))
        found = cls(weight=weight, bias=names.of(bias), aligned=shape)
        # The normalized input is computed again, because it cannot be recovered from the output
        # where the scale is zero.
        return [Recognized(found, normalize(x))]

    @classmethod
    def _of_product(cls, call: FunctionCall, names: Names) -> list[Recognized]:
        """The use of a gain ``x * w``."""
        if len(call.args) != 2 or call.kwargs:
            return []
        own = [x for x in call.args if names.view(x) is not None]
        if len(own) != 1 or not all(isinstance(x, Tensor) for x in call.args):
            return []
        gain, x = own[0], call.args[0] if own[0] is call.args[1] else call.args[1]
        view = names.view(gain)
        if view is None or not view.is_whole or not view.is_in_order() or x.ndim == 0:
            return []
        out = torch.broadcast_shapes(x.shape, gain.shape)
        aligned = aligned_shape(gain)
        if len(aligned) >= len(out) and 1 not in aligned:
            return []
        inputs = scaled(x, view.factor)
        return [Recognized(cls(weight=view.name, aligned=aligned), inputs.expand(out))]

    def apply(self, params: Params, x: Tensor) -> Tensor:
        weight = params[self.weight].reshape(self.aligned)
        if self.bias is None:
            return x * weight
        return x * weight + params[self.bias].reshape(self.aligned)

    def takes(self, place: Place) -> bool:
        own = place.axis - (len(self.shape) - len(self.aligned))
        return own < 0 or self.aligned[own] == 1

    def by_example(self, inputs: Tensor, grads: Tensor, place: Place) -> LayerUse:
        use = super().by_example(inputs, grads, place)
        own = place.axis - (len(self.shape) - len(self.aligned))
        if own < 0:
            return use
        # The axis of the examples, of which the weight has one entry, is the first one now.
        aligned = (*self.aligned[:own], *self.aligned[own + 1 :])
        return dataclasses.replace(use, call=dataclasses.replace(use.call, aligned=aligned))

    def rows(self, x: Tensor, lead: int) -> Tensor:
        """Reshape to (*lead, T, U), with the U units last and all other axes flattened.

        Args:
            x: an input or an output gradient.
            lead: the number of leading axes to keep, the last of which has the examples.
        """
        units = [x.ndim - len(self.aligned) + k for k, n in enumerate(self.aligned) if n != 1]
        last = [*range(x.ndim - len(units), x.ndim)]
        x = x if units == last else x.movedim(units, last)
        length = x.shape[x.ndim - len(units) :].numel()
        count = x.shape[lead - 1] // self.inner
        return x.reshape(*x.shape[: lead - 1], count, -1, length)

    def unit_gradients(self, uses: Sequence[LayerUse], bias: bool) -> Tensor:
        """Compute the per-sample gradients of each unit: (V, N, U, 1), or with a bias (V, N, U, 2).

        Args:
            uses: all uses of the layer.
            bias: whether the gradients in the bias are included.
        """
        terms = []
        for use in uses:
            g = self.rows(use.grads, 2)
            g = g.to(factor_dtype(g))
            parts = [(g * self.rows(use.inputs, 1)).sum(-2)] + ([g.sum(-2)] if bias else [])
            terms.append(torch.stack(parts, -1))
        return functools.reduce(torch.add, terms)

    def unit_blocks(self, uses: Sequence[LayerUse], bias: bool, scale: Tensor) -> Tensor:
        """Compute the exact curvature block of each unit: (U, 1, 1), or with a bias (U, 2, 2).

        Args:
            uses, bias: see :meth:`unit_gradients`.
            scale: the factor of the sum of outer products, a 0-d tensor.
        """
        gradients = self.unit_gradients(uses, bias)
        return torch.einsum("vnup,vnuq->upq", gradients, gradients) * scale.to(gradients.dtype)

    def example_gradients(self, uses: Sequence[LayerUse], params: Params) -> dict[str, Tensor]:
        gradients = self.unit_gradients(uses, self.bias is not None).flatten(0, 1)
        names = [self.weight] + ([] if self.bias is None else [self.bias])
        return {
            k: gradients[..., j].reshape(-1, *params[k].shape)
            for j, k in enumerate(names)
            if k in params
        }


def aligned_shape(gain: Tensor) -> tuple[int, ...]:
    """The shape of a tensor without its first axes of length 1, which broadcasting adds."""
    shape = tuple(gain.shape)
    while shape[:1] == (1,):
        shape = shape[1:]
    return shape


# ---------------------------------------------------------------------------- normalization layers
# The parts of a call: the scale, the bias, the number of trailing axes of the scale, and the
# normalization without scale and bias.
Norm = tuple[Any, Any, int, Callable[[Tensor], Tensor]]


def _layer_norm(call: FunctionCall) -> Norm:
    shape, epsilon = call.argument(1, "normalized_shape"), call.argument(4, "eps", 1e-5)
    scale, bias = call.argument(2, "weight"), call.argument(3, "bias")
    return scale, bias, len(shape), lambda x: F.layer_norm(x, shape, None, None, epsilon)


def _rms_norm(call: FunctionCall) -> Norm:
    shape, epsilon = call.argument(1, "normalized_shape"), call.argument(3, "eps")
    scale = call.argument(2, "weight")
    return scale, None, len(shape), lambda x: F.rms_norm(x, shape, None, epsilon)


def _group_norm(call: FunctionCall) -> Norm:
    groups, epsilon = call.argument(1, "num_groups"), call.argument(4, "eps", 1e-5)
    scale, bias = call.argument(2, "weight"), call.argument(3, "bias")
    return scale, bias, 0, lambda x: F.group_norm(x, groups, None, None, epsilon)


def _statistics_norm(flag: str, call: FunctionCall) -> Norm:
    """Batch and instance norm, with the name of the flag for the use of the batch's statistics."""
    mean, variance = call.argument(1, "running_mean"), call.argument(2, "running_var")
    if call.argument(5, flag, False) or mean is None:
        # Left out, so that only the model's own call updates the running statistics.
        mean = variance = None
    scale, bias = call.argument(3, "weight"), call.argument(4, "bias")
    epsilon = call.argument(7, "eps", 1e-5)

    def normalize(x: Tensor) -> Tensor:
        return call.function(x, mean, variance, None, None, mean is None, 0.0, epsilon)

    return scale, bias, 0, normalize


_NORMS: dict[Callable, Callable[[FunctionCall], Norm]] = {
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: functools.partial(_statistics_norm, "training"),
    F.instance_norm: functools.partial(_statistics_norm, "use_input_stats"),
}
