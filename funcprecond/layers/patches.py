r"""The patches that a convolution multiplies by its kernel, for any number of spatial axes.

The Gram matrix of the patches is symmetric, and its blocks are similar to each other. The block for
the rows (i, i + d) of the kernel is :math:`\sum_h x_{h+i}^T x_{h+i+d}`, a sum over the rows h of
the output. So the block for (i + 1, i + 1 + d) has the same terms, except for one at each end of
the sum. A k x k kernel then needs k products instead of k², and patches of one row of the kernel
instead of k rows.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from funcprecond.linalg.gram import gram

__all__ = ["pads", "patch_gram", "transposed_patches", "unfold", "windows"]

# Patches with fewer entries are multiplied example by example.
NARROW = 32


def unfold(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
) -> Tensor:
    """Cut out the patches that a convolution multiplies by its kernel.

    Args:
        x: the input, (N, C, *space).
        kernel, stride, padding, dilation: the options of the convolution, one number per axis. The
            padding may also be a string.

    Returns:
        (N, C * kernel, T), the patches at T positions. The entries of a patch are in the order of
        the flattened weight: the channel first, and then the axes of the kernel.
    """
    dims = len(kernel)
    x = windows(F.pad(x, pads(kernel, padding, dilation)), kernel, stride, dilation)
    # (N, C, *out, *kernel) -> (N, C, *kernel, *out)
    x = x.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    return x.flatten(1, 1 + dims).flatten(2)


def windows(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """View (..., *space) as (..., *out, *kernel), all windows over the last axes."""
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
    """Cut out the patches of the output that the inputs of a transposed convolution contribute to.

    Args:
        g: a tensor shaped like the outputs, (N, O, *output space).
        kernel, stride, padding, dilation: the options of the convolution, one number per axis.
        added: its ``output_padding``, which reduces the padding at the end of each axis.

    Returns:
        (N, O * kernel, T), a patch for each of T input positions.
    """
    axes = reversed(list(zip(padding, added, strict=True)))
    ends = [n for before, less in axes for n in (before, before - less)]
    return unfold(F.pad(g, ends), kernel, stride, "valid", dilation)


def pads(kernel: Sequence[int], padding: Sequence[int] | str, dilation: Sequence[int]) -> list[int]:
    """Compute the argument of :func:`torch.nn.functional.pad` for the padding of a convolution."""
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
    """Compute the Gram matrices and the sums of the patches of :func:`unfold`.

    Args:
        x: the input, (N, C, *space).
        kernel, stride, padding, dilation: see :func:`unfold`.
        groups: the number of groups, J.

    Returns:
        The Gram matrices (J, F, F) and the sums (J, F). A patch has F = C / J * kernel entries in
        each group, in the order of the flattened weight.
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
    """Implement :func:`patch_gram` with k products of patches of one row of the kernel.

    See the docstring of this module.
    """
    k, d = kernel[0], dilation[0]
    # The patches are along the other axes. The first spatial axis leads, so that shifted rows are a
    # view. The channels are made the last axis in memory first, so that each patch is copied in
    # contiguous pieces.
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
        # Rows of padding add nothing to the sum. In ``added``, the leading axis comes last.
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
