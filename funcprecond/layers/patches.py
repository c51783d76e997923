r"""The patches that a convolution multiplies its kernel with, for any number of spatial axes.

The Gram matrix of patches repeats itself, besides being symmetric. Its block at the kernel's rows
(i, i + d) is :math:`\sum_h x_{h+i}^T x_{h+i+d}` over the output's rows h, so the block at (i + 1, i
+ 1 + d) has the same terms but for one row at each end. A k x k kernel then takes k products, not
k², and patches of one row of the kernel, not of k.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from funcprecond.linalg.gram import gram

__all__ = ["pads", "patch_gram", "transposed_patches", "unfold", "windows"]

# Patches of fewer entries are multiplied example by example.
NARROW = 32


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


def patch_gram(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """(J, F, F) Gram matrices and (J, F) sums of the patches that :func:`unfold` gives.

    Args:
        x: (N, C, *space).
        kernel, stride, padding, dilation, groups: the convolution's; J groups, and F = C / J *
            kernel in the order of the flattened weight.
    """
    narrow = x.shape[1] // groups * math.prod(kernel) < NARROW
    if not narrow and kernel[0] > 1 and stride[0] == 1:
        return _patch_gram_by_lines(x, kernel, stride, padding, dilation, groups)
    patches = unfold(x, kernel, stride, padding, dilation)
    patches = rearrange(patches, "n (j c) t -> j n c t", j=groups)
    if narrow:
        return (patches @ patches.mT).sum(1), patches.sum((1, 3))
    rows = rearrange(patches, "j n c t -> j (n t) c")
    return gram(rows), rows.sum(-2)


def _patch_gram_by_lines(x, kernel, stride, padding, dilation, groups) -> tuple[Tensor, Tensor]:
    """The same by the products of the kernel's rows, of which k of k² are different."""
    k, d = kernel[0], dilation[0]
    # Patches along the other axes; this one leads, so that shifted rows are a view. The channels
    # are brought together first, so that what is copied for each patch is in one piece.
    added = pads(kernel, padding, dilation)
    x = F.pad(x, added)
    x = rearrange(x, "n (j c) h ... -> j h n ... c", j=groups).contiguous().movedim(-1, 3)
    height, count, of_channel = x.shape[1:4]
    rest = len(kernel) - 1
    flat = windows(x, kernel[1:], stride[1:], dilation[1:])
    # (j, h, n, c, *out, *kernel) -> (j, h, (n *out), (*kernel c))
    positions = count * math.prod(flat.shape[4 : 4 + rest])
    lines = flat.movedim(3, -1).reshape(groups, height, positions, -1)
    out = height - d * (k - 1)

    def part(start: int, stop: int, shift: int) -> Tensor:
        # Rows of padding, the leading axis's last in torch's order, add nothing.
        start, stop = max(start, added[-2]), min(stop, height - added[-1] - shift)
        if stop <= start:
            return lines.new_zeros(groups, lines.shape[-1], lines.shape[-1])
        left = lines[:, start:stop].flatten(1, 2)
        if shift == 0:
            return gram(left)
        return left.mT @ lines[:, start + shift : stop + shift].flatten(1, 2)

    blocks: dict[tuple[int, int], Tensor] = {}
    for step in range(k):
        for i in range(k - step):
            start, shift = i * d, step * d
            if i == 0 or out <= 2 * d:
                block = part(start, start + out, shift)
            else:
                gone, come = start - d, start - d + out
                block = blocks[i - 1, i - 1 + step] - part(gone, start, shift)
                block = block + part(come, come + d, shift)
            blocks[i, i + step] = block
            blocks[i + step, i] = block.mT
    whole = torch.stack([torch.stack([blocks[i, j] for j in range(k)], 1) for i in range(k)], 1)
    per_line = lines.sum(2)
    sums = torch.stack([per_line[:, i * d : i * d + out].sum(1) for i in range(k)], 1)
    whole = rearrange(whole, "j k l (r c) (s e) -> j (c k r) (e l s)", c=of_channel, e=of_channel)
    return whole, rearrange(sums, "j k (r c) -> j (c k r)", c=of_channel)
