"""The patches that a convolution multiplies its kernel with, for any number of spatial axes."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

__all__ = ["pads", "transposed_patches", "unfold", "windows"]


def unfold(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
) -> Tensor:
    """(N, C, *space) to (N, C * kernel, T) patches, for any number of spatial axes.

    The patch axis is ordered as the flattened weight's: channel first, then the kernel's axes.
    """
    dims = len(kernel)
    x = windows(F.pad(x, pads(kernel, padding, dilation)), kernel, stride, dilation)
    # (N, C, *out, *kernel) -> (N, C, *kernel, *out)
    x = x.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    return x.flatten(1, 1 + dims).flatten(2)


def windows(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """(..., *space) as (..., *out, *kernel): all windows over the last axes, a view."""
    first = x.ndim - len(kernel)
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), first):
        x = x.unfold(axis, gap * (size - 1) + 1, step)[..., ::gap]
    return x


def transposed_patches(
    g: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    added: Sequence[int],
) -> Tensor:
    """(N, O, *output space) to (N, O * kernel, T): what each input of a transposed convolution met.

    Args:
        g: shaped like the outputs.
        kernel, stride, padding, dilation: the convolution's.
        added: its ``output_padding``, by which the padding is less at the end.
    """
    axes = reversed(list(zip(padding, added, strict=True)))
    ends = [n for before, less in axes for n in (before, before - less)]
    return unfold(F.pad(g, ends), kernel, stride, "valid", dilation)


def pads(kernel: Sequence[int], padding: Sequence[int] | str, dilation: Sequence[int]) -> list[int]:
    """What :func:`torch.nn.functional.pad` takes for a convolution's padding."""
    found: list[int] = []
    for axis in reversed(range(len(kernel))):
        if padding == "same":
            total = dilation[axis] * (kernel[axis] - 1)
            found += [total // 2, total - total // 2]
        else:
            found += [0, 0] if isinstance(padding, str) else [padding[axis]] * 2
    return found
