"""What linear layers and convolutions have in common, against torch's own."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradgradcheck

from funcprecond.autodiff.rules.convolution import convolve
from funcprecond.autodiff.rules.linear import linear
from tests.equality import assert_close
from tests.problems import normal

# ours, torch's, input, weight, output, the products that torch's profiler is to see
LAYERS = {
    "linear": (
        linear,
        F.linear,
        (3, 4),
        (5, 4),
        (3, 5),
        {"aten::mm", "aten::addmm", "aten::addmm_"},
    ),
    "convolution": (
        functools.partial(convolve, F.conv2d),
        F.conv2d,
        (2, 3, 4, 4),
        (2, 3, 3, 3),
        (2, 2, 2, 2),
        {"aten::convolution", "aten::convolution_backward"},
    ),
}
every_layer = pytest.mark.parametrize("case", LAYERS)


def arguments_of(case):
    *_, x, w, _, _ = LAYERS[case]
    return tuple(normal(s, i).requires_grad_() for i, s in enumerate((x, w, w[:1])))


@every_layer
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_some_arguments_may_be_constant(case, wanted):
    arguments, layer = arguments_of(case), LAYERS[case][0]

    def f(*chosen):
        rest = iter(chosen)
        given = (next(rest) if i in wanted else x.detach() for i, x in enumerate(arguments))
        return layer(*given).square()

    assert gradgradcheck(f, tuple(arguments[i] for i in wanted))


@every_layer
@pytest.mark.parametrize("whose", [0, 1], ids=["ours", "torchs"])
def test_a_third_derivative(case, whose):
    layer = LAYERS[case][whose]

    def slope(*arguments):
        value = layer(*arguments).sin().sum()
        first = torch.autograd.grad(value, arguments, create_graph=True)
        return sum(g.square().sum() for g in first)

    assert gradgradcheck(slope, arguments_of(case))


@every_layer
def test_leaves_of_a_plain_backward_pass_are_served(case):
    found = []
    for layer in LAYERS[case][:2]:
        x, w, b = arguments_of(case)
        value = layer(x, w, b).square().sum()
        gradient = torch.autograd.grad(value, w, create_graph=True)[0]
        gradient.square().sum().backward()
        found.append((x.grad, w.grad, b.grad))
    assert_close(*found, rtol=1e-12)


@every_layer
def test_what_is_not_wanted_is_not_computed(case):
    layer, torchs, *_, out, products = LAYERS[case]
    x, w, b = (t * 1 for t in arguments_of(case))
    u = normal(out, 9).requires_grad_()
    pulled = torch.autograd.grad(layer(x, w, b), (x, w, b), u, create_graph=True)
    v_x, v_w, v_b = vectors = [normal(t.shape, 7) for t in pulled]
    pushed = torch.autograd.grad(pulled, u, vectors, retain_graph=True)[0]
    assert_close(pushed, torchs(v_x, w, v_b) + torchs(x, v_w), rtol=1e-12)
    with torch.profiler.profile() as profile:
        torch.autograd.grad(pulled, u, vectors)
    assert sum(e.count for e in profile.key_averages() if e.key in products) == 2
