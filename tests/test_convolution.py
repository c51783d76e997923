"""Convolutions of our own differentiation against torch's values and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from funcprecond.convolution import convolve
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


def leaves(*shapes):
    return tuple(normal(s, i).requires_grad_() for i, s in enumerate(shapes))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_some_arguments_may_be_constant(wanted):
    arguments = leaves((2, 3, 4, 4), (2, 3, 3, 3), (2,))

    def f(*chosen):
        rest = iter(chosen)
        given = (next(rest) if i in wanted else x.detach() for i, x in enumerate(arguments))
        return convolve(F.conv2d, *given).square()

    assert gradgradcheck(f, tuple(arguments[i] for i in wanted))


@pytest.mark.parametrize(
    "layer", [lambda *a: convolve(F.conv2d, *a), F.conv2d], ids=["ours", "torchs"]
)
def test_a_third_derivative(layer):
    x, w, b = leaves((1, 2, 3, 3), (2, 2, 2, 2), (2,))

    def slope(x, w, b):
        value = layer(x, w, b).sin().sum()
        first = torch.autograd.grad(value, (x, w, b), create_graph=True)
        return sum(g.square().sum() for g in first)

    assert gradgradcheck(slope, (x, w, b))


def test_what_is_not_wanted_is_not_computed():
    x, w, b = (t * 1 for t in leaves((2, 3, 4, 4), (2, 3, 3, 3), (2,)))
    v = normal((2, 2, 2, 2), 9).requires_grad_()
    pulled = torch.autograd.grad(convolve(F.conv2d, x, w, b), (x, w, b), v, create_graph=True)
    vectors = [normal(t.shape, 7) for t in pulled]
    pushed = torch.autograd.grad(pulled, v, vectors, retain_graph=True)[0]
    v_x, v_w, v_b = vectors
    assert_close(pushed, F.conv2d(v_x, w, v_b) + F.conv2d(x, v_w), rtol=1e-12)
    with torch.profiler.profile() as profile:
        torch.autograd.grad(pulled, v, vectors)
    counts = {e.key: e.count for e in profile.key_averages()}
    assert counts["aten::convolution"] == 2
    assert "aten::convolution_backward" not in counts


def test_leaves_of_a_plain_backward_pass_are_served():
    x, w = normal((2, 3, 4, 4), 1).requires_grad_(), normal((2, 3, 3, 3), 2).requires_grad_()
    gradient = torch.autograd.grad(convolve(F.conv2d, x, w).square().sum(), w, create_graph=True)[0]
    gradient.square().sum().backward()
    ours, x.grad, w.grad = (x.grad, w.grad), None, None
    gradient = torch.autograd.grad(F.conv2d(x, w).square().sum(), w, create_graph=True)[0]
    gradient.square().sum().backward()
    assert_close(ours, (x.grad, w.grad), rtol=1e-12)


def test_transforms_and_single_examples_are_torchs_own():
    x, w = normal((5, 2, 3, 4, 4), 1), normal((2, 3, 3, 3), 2)
    f = lambda x: convolve(F.conv2d, x, w)  # noqa: E731
    assert_close(torch.vmap(f)(x), torch.stack([F.conv2d(y, w) for y in x]), rtol=1e-12)
    assert_close(f(x[0, 0]), F.conv2d(x[0, 0], w), rtol=1e-12)
    tangent = torch.func.jvp(f, (x[0],), (x[1],))[1]
    assert_close(tangent, F.conv2d(x[1], w), rtol=1e-12)
