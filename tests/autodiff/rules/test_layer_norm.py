"""Functions of our own differentiation against torch's values and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from funcprecond.autodiff.rules.gelu import gelu
from funcprecond.autodiff.rules.layer_norm import layer_norm
from funcprecond.autodiff.rules.weight_norm import weight_norm
from tests.equality import assert_close
from tests.problems import normal


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate):
    x = (2 * normal((3, 5), 1)).requires_grad_()
    f = lambda x: gelu(x, approximate)  # noqa: E731
    assert_close(f(x), F.gelu(x, approximate=approximate), rtol=1e-13)
    assert gradcheck(f, x)
    assert gradgradcheck(f, x)
    third = lambda x: torch.autograd.grad(f(x).square().sum(), x, create_graph=True)[0]  # noqa: E731
    assert gradgradcheck(third, x)


@pytest.mark.parametrize("parts", [(), ("weight",), ("weight", "bias")])
@pytest.mark.parametrize("shape", [(4,), (2, 4)])
def test_layer_norm(parts, shape):
    x = normal((3, 2, 4), 1).requires_grad_()
    given = [normal(shape, i).requires_grad_() for i, _ in enumerate(parts, 2)]
    f = lambda x, *given: layer_norm(x, shape, *given, *[None] * (2 - len(given)), 1e-3)  # noqa: E731
    theirs = F.layer_norm(x, shape, *given, *[None] * (2 - len(given)), 1e-3)
    assert_close(f(x, *given), theirs, rtol=1e-12)
    assert gradcheck(f, (x, *given))
    assert gradgradcheck(f, (x, *given))


def test_a_third_derivative_of_layer_norm_is_refused():
    x = normal((3, 4), 1).requires_grad_()
    first = torch.autograd.grad(layer_norm(x, (4,)).pow(3).sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="third"):
        torch.autograd.grad(first.square().sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("shape", "dim"), [((3, 4), 0), ((3, 4), 1), ((3, 4), -1), ((3,), 0), ((2, 3, 2), 1)]
)
def test_weight_norm(shape, dim):
    v = normal(shape, 1).requires_grad_()
    g = torch.norm_except_dim(normal(shape, 2), 2, dim).requires_grad_()
    f = lambda v, g: weight_norm(v, g, dim)  # noqa: E731
    assert_close(f(v, g), torch._weight_norm(v, g, dim), rtol=1e-13)
    assert gradcheck(f, (v, g))
    assert gradgradcheck(f, (v, g))


def test_a_kept_graph_gives_the_same_product_again():
    x = normal((3, 4), 1).requires_grad_()
    first = torch.autograd.grad(gelu(layer_norm(x, (4,))).sum(), x, create_graph=True)[0]
    v = normal((3, 4), 2)
    one, two = (torch.autograd.grad(first, x, v, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("function", [gelu, lambda x: layer_norm(x, (4,))])
def test_transforms_take_torchs_own(function):
    x = normal((3, 4), 1)
    hessian = lambda f: torch.func.jacrev(torch.func.grad(lambda x: f(x).pow(3).sum()))(x)  # noqa: E731
    theirs = F.gelu if function is gelu else lambda x: F.layer_norm(x, (4,))
    assert_close(hessian(function), hessian(theirs), rtol=1e-12)
