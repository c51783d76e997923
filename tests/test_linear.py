"""Linear layers of our own differentiation against torch's values and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from funcprecond.linear import linear
from tests.equality import assert_close
from tests.problems import normal

SHAPES = {"rows": (3, 4), "positions": (2, 3, 4), "no row": (0, 4), "more axes": (2, 1, 2, 4)}


def leaves(*shapes):
    return tuple(normal(s, i).requires_grad_() for i, s in enumerate(shapes))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("case", SHAPES)
def test_all_derivatives(case, with_bias):
    arguments = leaves(SHAPES[case], (5, 4), *[(5,)] * with_bias)
    assert_close(linear(*arguments), F.linear(*arguments), rtol=1e-12)
    assert gradcheck(linear, arguments)
    assert gradgradcheck(linear, arguments)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_some_arguments_may_be_constant(wanted):
    arguments = leaves((3, 4), (5, 4), (5,))

    def f(*chosen):
        rest = iter(chosen)
        return linear(*(next(rest) if i in wanted else x.detach() for i, x in enumerate(arguments)))

    assert gradgradcheck(f, tuple(arguments[i] for i in wanted))


@pytest.mark.parametrize("layer", [linear, F.linear], ids=["ours", "torchs"])
def test_a_third_derivative(layer):
    x, w, b = leaves((3, 4), (5, 4), (5,))

    def slope(x, w, b):
        value = layer(x, w, b).sin().sum()
        first = torch.autograd.grad(value, (x, w, b), create_graph=True)
        return sum(g.square().sum() for g in first)

    assert gradgradcheck(slope, (x, w, b))


def test_leaves_of_a_plain_backward_pass_are_served():
    found = []
    for layer in (linear, F.linear):
        x, w, b = leaves((3, 4), (5, 4), (5,))
        value = layer(x, w, b).square().sum()
        gradient = torch.autograd.grad(value, w, create_graph=True)[0]
        gradient.square().sum().backward()
        found.append((x.grad, w.grad, b.grad))
    assert_close(*found, rtol=1e-12)


def test_what_is_not_wanted_is_not_computed():
    x, w, b = (t * 1 for t in leaves((3, 4), (5, 4), (5,)))
    v = normal((3, 5), 9).requires_grad_()
    pulled = torch.autograd.grad(linear(x, w, b), (x, w, b), v, create_graph=True)
    vectors = [normal(t.shape, 7) for t in pulled]
    pushed = torch.autograd.grad(pulled, v, vectors, retain_graph=True)[0]
    v_x, v_w, v_b = vectors
    assert_close(pushed, F.linear(v_x, w, v_b) + F.linear(x, v_w), rtol=1e-12)
    with torch.profiler.profile() as profile:
        torch.autograd.grad(pulled, v, vectors)
    names = {"aten::mm", "aten::addmm", "aten::addmm_"}
    assert sum(e.count for e in profile.key_averages() if e.key in names) == 2


def test_complex_numbers_are_torchs_own():
    x, w = (torch.complex(normal(s, 1), normal(s, 2)).requires_grad_() for s in ((3, 4), (5, 4)))
    assert gradcheck(linear, (x, w))


def test_transforms_vectors_and_autocast_are_torchs_own():
    x, w, b = normal((6, 3, 4), 1), normal((5, 4), 2), normal((5,), 3)
    expected = torch.stack([F.linear(y, w, b) for y in x])
    assert_close(torch.vmap(lambda y: linear(y, w, b))(x), expected, rtol=1e-12)
    assert_close(torch.func.jvp(lambda y: linear(y, w, b), (x,), (x,))[1], F.linear(x, w))
    assert_close(linear(x[0, 0], w, b), F.linear(x[0, 0], w, b), rtol=1e-12)
    x, w, b = (t.float().requires_grad_() for t in (x, w, b))
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(x, w, b)
    assert out.dtype == torch.bfloat16
    first = torch.autograd.grad(out.float().square().sum(), w, create_graph=True)[0]
    first.square().sum().backward()
    assert w.grad.dtype == torch.float32
