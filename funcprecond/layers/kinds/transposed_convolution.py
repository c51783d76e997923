"""Transposed convolutions, which multiply each input position by the kernel to a patch of outputs.

The input rows are the input positions, and the rows of the output gradients are patches. The bias
belongs to the output positions and not to the input positions, so it is recorded as a layer of its
own.
"""

import dataclasses
import math
from typing import ClassVar

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from funcprecond.layers.kinds.affine import AffineCall
from funcprecond.layers.kinds.convolution import per_axis
from funcprecond.layers.kinds.scale import Scale
from funcprecond.layers.layer_call import FunctionCall, Names, Recognized, Sharing
from funcprecond.layers.patches import transposed_patches
from funcprecond.tree import Params

__all__ = ["TransposedConvolution"]

# The functions by number of spatial axes.
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransposedConvolution(AffineCall):
    """A use of an (i, o / J, *kernel) weight.

    Attributes:
        kernel, stride, padding, dilation, output_padding: one number per spatial axis.
        channel_groups: the number of groups, J.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    channel_groups: int

    functions = tuple(TRANSPOSED.values())
    inputs_first: ClassVar[bool] = True  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def recognize(cls, call: FunctionCall, names: Names) -> list[Recognized]:
        x, kernel = call.argument(0, "input"), call.argument(1, "weight")
        weight, bias = names.of(kernel), names.of(call.argument(2, "bias"))
        if not weight or x.ndim != kernel.ndim:
            return []
        dims = kernel.ndim - 2
        stride, padding, added, dilation = (
            per_axis(option, dims)
            for option in (
                call.argument(3, "stride", 1),
                call.argument(4, "padding", 0),
                call.argument(5, "output_padding", 0),
                call.argument(7, "dilation", 1),
            )
        )
        found = cls(
            weight=weight,
            kernel=tuple(kernel.shape[2:]),
            stride=stride,
            padding=padding,
            dilation=dilation,
            output_padding=added,
            channel_groups=call.argument(6, "groups", 1),
        )
        uses = [Recognized(found, x)]
        if not bias:
            return uses
        channels = kernel.shape[1] * found.groups
        aligned = (channels, *[1] * dims)
        return [*uses, Recognized(Scale(weight=bias, aligned=aligned), None)]

    def apply(self, params: Params, x: Tensor) -> Tensor:
        transpose = TRANSPOSED[len(self.kernel)]
        return transpose(
            x,
            params[self.weight],
            None,
            self.stride,  # pyright: ignore[reportArgumentType]
            self.padding,  # pyright: ignore[reportArgumentType]
            self.output_padding,  # pyright: ignore[reportArgumentType]
            self.channel_groups,
            self.dilation,  # pyright: ignore[reportArgumentType]
        )

    @property
    def groups(self) -> int:
        return self.channel_groups

    @property
    def fan_out(self) -> int:
        return self.shape[1] // self.groups * math.prod(self.kernel)

    def fan_in(self, x: Tensor) -> int:
        return x.shape[1] // self.groups

    def cut_inputs(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        return x.mT if self.groups == 1 else rearrange(x, "n (j c) t -> j n t c", j=self.groups)

    def cut_grads(self, g: Tensor, x: Tensor) -> Tensor:
        geometry = (self.kernel, self.stride, self.padding, self.dilation, self.output_padding)
        patches = transposed_patches(g.flatten(0, 1), *geometry).unflatten(0, g.shape[:2])
        if self.groups == 1:
            return patches.mT
        return rearrange(patches, "v n (j o) t -> j v n t o", j=self.groups)

    def positions(self, x: Tensor, sharing: Sharing) -> int:
        return x.shape[0] // self.inner if sharing == "reduce" else x.numel() // x.shape[1]
