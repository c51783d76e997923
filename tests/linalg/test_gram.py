"""Second moments against the rows themselves, written out."""

import pytest
import torch
import torch.nn.functional as F

from funcprecond.layers.patches import NARROW, patch_gram
from funcprecond.linalg.gram import MANY, WIDE, bordered, gram
from tests.equality import assert_close
from tests.problems import normal

# kernel, stride, padding, dilation, groups, space
CONVOLUTIONS = {
    "3 x 3": ((3, 3), (1, 1), (1, 1), (1, 1), 1, (7, 6)),
    "no padding": ((3, 2), (1, 1), (0, 0), (1, 1), 1, (6, 5)),
    "much padding": ((3, 3), (1, 1), (3, 2), (1, 1), 1, (4, 5)),
    "few rows": ((5, 3), (1, 1), (0, 0), (1, 1), 1, (6, 5)),
    "one row of output": ((4, 1), (1, 1), (0, 0), (1, 1), 1, (4, 5)),
    "dilated": ((3, 2), (1, 1), (2, 1), (2, 3), 1, (9, 8)),
    "dilated, few rows": ((3, 3), (1, 1), (0, 0), (3, 1), 1, (8, 5)),
    "strided": ((3, 3), (2, 2), (1, 1), (1, 1), 1, (7, 6)),
    "strided across": ((3, 3), (1, 2), (1, 1), (1, 1), 1, (7, 6)),
    "grouped": ((3, 3), (1, 1), (1, 1), (1, 1), 2, (6, 6)),
    "one row of the kernel": ((1, 3), (1, 1), (0, 1), (1, 1), 2, (6, 6)),
}


def patches(x, kernel, stride, padding, dilation, groups):
    """(J, M, F) rows by torch's own unfolding."""
    n, c = x.shape[:2]
    flat = F.unfold(x, kernel, dilation, padding, stride)
    flat = flat.reshape(n, groups, c // groups * kernel[0] * kernel[1], -1)
    return flat.permute(1, 0, 3, 2).flatten(1, 2)


@pytest.fixture(params=[0, NARROW], ids=["row by row", "example by example"])
def narrow(request, monkeypatch):
    """Both ways to the moments of patches, whatever their size."""
    monkeypatch.setattr("funcprecond.layers.patches.NARROW", request.param)


@pytest.mark.parametrize("shape", [(7, 3), (8200, 65), (1300, 162), (2, 860, 199)])
@pytest.mark.parametrize("with_ones", [False, True])
def test_a_gram_matrix_is_the_product_of_its_rows(shape, with_ones):
    rows, (count, n) = normal(shape, 1), shape[-2:]
    assert n < WIDE or count * n * n > MANY, "the blocks are what is tested"
    found = gram(rows, count if with_ones else None)
    if with_ones:
        rows = torch.cat([rows, torch.ones(*shape[:-1], 1, dtype=rows.dtype)], -1)
    assert_close(found, torch.einsum("...mi,...mj->...ij", rows, rows), rtol=1e-12)


def test_a_border_stands_for_rows_with_a_one():
    rows = normal((2, 7, 3), 1)
    with_ones = torch.cat([rows, torch.ones(2, 7, 1, dtype=rows.dtype)], -1)
    found = bordered(gram(rows), rows.sum(-2), 7)
    assert_close(found, with_ones.mT @ with_ones, rtol=1e-12)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_the_patches_of_a_convolution_have_the_moments_of_their_rows(case):
    *geometry, space = CONVOLUTIONS[case]
    x = normal((3, 4, *space), 2)
    rows = patches(x, *geometry)
    moment, sums = patch_gram(x, *geometry)
    assert_close(moment, torch.einsum("jmf,jmg->jfg", rows, rows), rtol=1e-12)
    assert_close(sums, rows.sum(1), rtol=1e-12)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("dims", [1, 3])
def test_any_number_of_axes(dims):
    kernel, space = (3, 2, 2)[:dims], (6, 4, 3)[:dims]
    x = normal((2, 3, *space), 3)
    geometry = (kernel, (1,) * dims, (1,) * dims, (1,) * dims)
    # A convolution with each unit kernel gives one entry of every patch.
    size = 3 * torch.Size(kernel).numel()
    units = torch.eye(size, dtype=x.dtype).reshape(size, 3, *kernel)
    convolve = {1: F.conv1d, 3: F.conv3d}[dims]
    rows = convolve(x, units, padding=1).flatten(2).transpose(1, 2).flatten(0, 1)
    moment, sums = patch_gram(x, *geometry, 1)
    assert_close(moment[0], rows.mT @ rows, rtol=1e-12)
    assert_close(sums[0], rows.sum(0), rtol=1e-12)


@pytest.mark.usefixtures("narrow")
def test_same_padding():
    x = normal((2, 3, 6, 5), 4)
    left = patch_gram(x, (3, 3), (1, 1), "same", (1, 1), 1)
    right = patch_gram(x, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    assert_close(left[0], right[0], rtol=1e-14)
