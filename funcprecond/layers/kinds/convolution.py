"""Convolutions of one to three axes, with any stride, padding, dilation and number of groups."""

import dataclasses
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from funcprecond.layers.kinds.affine import AffineCall
from funcprecond.layers.kinds.bias import Bias
from funcprecond.layers.layer_call import FunctionCall, LayerUse, Names, Recognized, Sharing
from funcprecond.layers.patches import patch_gram, unfold
from funcprecond.linalg.gram import bordered
from funcprecond.linalg.precision import factor_dtype
from funcprecond.tree import Params

__all__ = ["CONVOLUTIONS", "Convolution", "per_axis"]

# The functions by number of spatial axes.
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convolution(AffineCall):
    """A use of an (o, i / J, *kernel) weight. Its input rows are patches.

    Attributes:
        kernel, stride, padding, dilation: one number per spatial axis; the padding may be a string.
        channel_groups: the number of groups, J.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    channel_groups: int
    channel: ClassVar[int] = 1

    functions = tuple(CONVOLUTIONS.values())

    @classmethod
    def recognize(cls, call: FunctionCall, names: Names) -> list[Recognized]:
        kernel = call.argument(1, "weight")
        weight, x = names.of(kernel), call.argument(0, "input")
        if x.ndim < kernel.ndim:
            return []
        if not weight:
            return Bias.of(names, call.argument(2, "bias"), 1)
        dims = kernel.ndim - 2
        options = (call.argument(3, "stride", 1), call.argument(4, "padding", 0))
        stride, padding, dilation = (
            per_axis(option, dims) for option in (*options, call.argument(5, "dilation", 1))
        )
        found = cls(
            weight=weight,
            bias=names.of(call.argument(2, "bias")),
            kernel=tuple(kernel.shape[2:]),
            stride=stride,
            padding=padding,
            dilation=dilation,
            channel_groups=call.argument(6, "groups", 1),
        )
        return [Recognized(found, x)]

    def apply(self, params: Params, x: Tensor) -> Tensor:
        convolve = CONVOLUTIONS[len(self.kernel)]
        bias = None if self.bias is None else params[self.bias]
        options = (self.stride, self.padding, self.dilation, self.channel_groups)
        return convolve(x, params[self.weight], bias, *options)  # pyright: ignore

    @property
    def groups(self) -> int:
        return self.channel_groups

    @property
    def fan_out(self) -> int:
        return self.shape[1] // self.groups

    def fan_in(self, x: Tensor) -> int:
        return x.shape[1] // self.groups * math.prod(self.kernel)

    def cut_inputs(self, x: Tensor) -> Tensor:
        patches = unfold(x, self.kernel, self.stride, self.padding, self.dilation)
        if self.groups == 1:
            return patches.mT
        return rearrange(patches, "n (j c) t -> j n t c", j=self.groups)

    def cut_grads(self, g: Tensor, x: Tensor) -> Tensor:
        g = g.flatten(3)
        return g.mT if self.groups == 1 else rearrange(g, "v n (j o) t -> j v n t o", j=self.groups)

    def positions(self, x: Tensor, sharing: Sharing) -> int:
        if sharing == "reduce":
            return self.shape[0] // self.inner
        return math.prod(self.shape) // self.shape[1]

    def input_moment(
        self, use: LayerUse, bias: bool, sharing: Sharing, dtype: torch.dtype, thin: bool
    ) -> Tensor:
        positions = self.positions(use.inputs, sharing)
        if sharing == "reduce" or positions <= self.fan_in(use.inputs):
            return super().input_moment(use, bias, sharing, dtype, thin)
        geometry = (self.kernel, self.stride, self.padding, self.dilation, self.groups)
        moment, sums = patch_gram(use.inputs.to(dtype), *geometry)
        moment = bordered(moment, sums, positions) if bias else moment
        return moment.squeeze(0) if self.groups == 1 else moment

    def input_sum(self, use: LayerUse, dtype: torch.dtype) -> Tensor:
        # Patches are linear in the image, so that those of the sum of the images are cut out once.
        return self.cut_inputs(use.inputs.to(dtype).sum(0, keepdim=True)).sum((-3, -2))

    def output_moment(self, use: LayerUse, sharing: Sharing) -> Tensor | None:
        outputs, positions = self.fan_out, math.prod(self.shape[2:])
        if sharing == "reduce" or outputs > positions:
            return None
        # These products take no more memory than the gradients, which are not copied for them.
        g = use.grads.to(factor_dtype(use.grads)).flatten(3)
        g = rearrange(g, "v n (j o) t -> (v n) j o t", j=self.groups)
        moment = (g @ g.mT).sum(0)
        return moment.squeeze(0) if self.groups == 1 else moment


def per_axis(option: Any, dims: int) -> Any:
    """Expand an option to one number per axis; a string is returned unchanged."""
    if isinstance(option, str):
        return option
    return tuple(option) if isinstance(option, (tuple, list)) else (option,) * dims
