"""Convolutions of our own differentiation against torch's values and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from funcprecond.autodiff.rules.convolution import convolve
from tests.equality import assert_close
from tests.problems import normal

# function, input, kernel, stride, padding, dilation, groups
CASES = {
    "plain": (F.conv2d, (2, 3, 4, 5), (2, 3, 3, 2), 1, 0, 1, 1),
    "strided": (F.conv2d, (2, 2, 5, 5), (3, 2, 3, 3), (2, 1), (1, 0), 1, 1),
    "rows that the stride leaves out": (F.conv2d, (1, 2, 6, 6), (2, 2, 3, 3), 2, 0, 1, 1),
    "dilated": (F.conv2d, (1, 2, 5, 5), (2, 2, 2, 2), 1, 1, (2, 1), 1),
    "grouped": (F.conv2d, (2, 4, 3, 3), (4, 2, 2, 2), 1, 1, 1, 2),
    "sequence": (F.conv1d, (2, 2, 6), (3, 2, 3), 2, 1, 1, 1),
    "volume": (F.conv3d, (1, 2, 3, 3, 3), (2, 2, 2, 2, 2), 1, 0, 1, 1),
    "same": (F.conv2d, (1, 2, 4, 4), (2, 2, 3, 3), 1, "same", 1, 1),
}


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_all_derivatives(case, with_bias):
    function, input, kernel, *options = CASES[case]
    x, w = normal(input, 1).requires_grad_(), normal(kernel, 2).requires_grad_()
    b = (normal(kernel[:1], 3).requires_grad_(),) if with_bias else ()

    def f(x, w, b=None):
        return convolve(function, x, w, b, *options)

    assert_close(f(x, w, *b), function(x, w, *b, *[] if b else [None], *options), rtol=1e-12)
    assert gradcheck(f, (x, w, *b))
    assert gradgradcheck(f, (x, w, *b))


def test_transforms_and_single_examples_are_torchs_own():
    x, w = normal((5, 2, 3, 4, 4), 1), normal((2, 3, 3, 3), 2)
    f = lambda x: convolve(F.conv2d, x, w)  # noqa: E731
    assert_close(torch.vmap(f)(x), torch.stack([F.conv2d(y, w) for y in x]), rtol=1e-12)
    assert_close(f(x[0, 0]), F.conv2d(x[0, 0], w), rtol=1e-12)
    tangent = torch.func.jvp(f, (x[0],), (x[1],))[1]
    assert_close(tangent, F.conv2d(x[1], w), rtol=1e-12)
