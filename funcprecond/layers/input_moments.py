r"""Second moments of a layer's inputs, without the work that their structure makes needless.

A Gram matrix :math:`X^T X` is symmetric: the blocks on and above the diagonal are all of it. That
of a convolution's patches repeats itself besides. Its block at the kernel's rows (i, i + d) is
:math:`\sum_h x_{h+i}^T x_{h+i+d}` over the output's rows h, so the block at (i + 1, i + 1 + d) has
the same terms but for one row at each end. A k x k kernel then takes k products, not k², and
patches of one row of the kernel, not of k.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from funcprecond.curvature.layer_statistics import LayerUse, Sharing
from funcprecond.layers.patches import pads, unfold, windows

__all__ = ["bordered", "gram", "input_factor", "patch_gram"]

# Blocks along each axis of a Gram matrix, and the fewest columns and products for which they pay.
BLOCKS, WIDE, MANY = 4, 64, 2**25
# Patches of fewer entries are multiplied example by example.
NARROW = 32


def gram(rows: Tensor, count: int | None = None) -> Tensor:
    """``rows^T rows`` of (..., M, n) rows; 5/8 of the products of a general one.

    With ``count``, the number of rows, that of the rows with a 1 appended: see :func:`bordered`.
    """
    n, sums = rows.shape[-1], None if count is None else rows.sum(-2)
    if n < WIDE or rows.shape[-2] * n * n < MANY:
        moment = rows.mT @ rows
        return moment if count is None or sums is None else bordered(moment, sums, count)
    size = -(-n // BLOCKS)
    above = [rows[..., i : i + size].mT @ rows[..., i:] for i in range(0, n, size)]
    lines = []
    for i, line in enumerate(above):
        wide = line.shape[-2]
        left = [above[j].narrow(-1, (i - j) * size, wide).mT for j in range(i)]
        right = [] if sums is None else [sums.narrow(-1, i * size, wide).unsqueeze(-1)]
        lines.append(torch.cat([*left, line, *right], -1))
    if count is not None and sums is not None:
        lines.append(torch.cat([sums, torch.full_like(sums[..., :1], count)], -1).unsqueeze(-2))
    return torch.cat(lines, -2)


def bordered(moment: Tensor, sums: Tensor, count: int) -> Tensor:
    """The Gram matrix of rows with a 1 appended: of theirs, (..., n, n), and their sums, (..., n).

    Returns:
        (..., n + 1, n + 1).
    """
    corner = torch.full_like(sums[..., :1], count)
    right = torch.cat([sums, corner], -1).unsqueeze(-1)
    return torch.cat([torch.cat([moment, sums.unsqueeze(-2)], -2), right], -1)


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


def input_factor(
    uses: Sequence[LayerUse], bias: bool, sharing: Sharing, dtype: torch.dtype, keep_rows: bool
) -> Tensor:
    """The mean of ``[a, 1] [a, 1]^T`` over all rows of an affine layer's inputs.

    Args:
        uses: all uses of the layer; not an embedding.
        bias: whether a 1 is appended.
        sharing: "reduce" takes the mean over an example's positions first.
        dtype: in which it is taken.
        keep_rows: return (..., M, i) rows whose Gram matrix it is, where they are fewer than their
            columns and of a single use.

    Returns:
        (i, i), and (J, i, i) for a convolution's groups, whatever their number.
    """
    total, count = None, 0
    for use in uses:
        positions = use.positions(sharing)
        if use.call.kind == "conv" and sharing == "expand" and positions > _patch_size(use):
            moment, sums = patch_gram(use.inputs.to(dtype), *use.geometry)
            moment = bordered(moment, sums, positions) if bias else moment
        else:
            rows = use.input_rows().to(dtype)
            rows = rows.mean(-2) if sharing == "reduce" else rows.flatten(-3, -2)
            few = positions < rows.shape[-1]
            if few and bias:
                rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
            if few and keep_rows and len(uses) == 1:
                return rows * positions**-0.5
            moment = gram(rows, positions if bias and not few else None)
        total = moment if total is None else total + moment
        count += positions
    return total / count  # pyright: ignore[reportOptionalOperand]


def _patch_size(use: LayerUse) -> int:
    kernel, *_, groups = use.geometry
    return use.inputs.shape[1] // groups * math.prod(kernel)
