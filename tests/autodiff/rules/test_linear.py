"""Linear layers of our own differentiation against torch's values and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from funcprecond.autodiff.rules.linear import linear
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
