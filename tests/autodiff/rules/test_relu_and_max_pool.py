"""ReLU and max-pooling of our own differentiation against torch's values and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import funcprecond as fp
from funcprecond.autodiff.rules.max_pool import max_pool2d
from funcprecond.autodiff.rules.relu import relu
from tests.equality import assert_close
from tests.problems import normal

POOLS = {
    "square": ((2, 3, 6, 6), {"kernel_size": 2}),
    "stride": ((2, 3, 7, 6), {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)}),
    "dilated": ((1, 2, 7, 7), {"kernel_size": 2, "stride": 2, "dilation": 2, "ceil_mode": True}),
    "overlapping": ((2, 1, 5, 5), {"kernel_size": [3, 3], "stride": 1}),
    "no batch": ((3, 6, 4), {"kernel_size": 2}),
}


def leaf(shape):
    # No two entries are within a finite difference of each other, or of zero.
    values = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64)
    signs = torch.where(values % 2 == 0, 1.0, -1.0)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    return (0.1 * values * signs)[order].reshape(shape).requires_grad_()


def third(f):
    def slope(x):
        return torch.autograd.grad((f(x) ** 3).sum(), x, create_graph=True)[0].square()

    return slope


@pytest.mark.parametrize("case", POOLS)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_max_pool(case, memory):
    shape, options = POOLS[case]
    x = leaf(shape)
    if len(shape) == 4:
        x = x.detach().contiguous(memory_format=memory).requires_grad_()
    f = lambda x: max_pool2d(x, **options)  # noqa: E731
    assert torch.equal(f(x), F.max_pool2d(x, **options))
    assert gradcheck(f, x)
    assert gradgradcheck(f, x)
    assert gradgradcheck(third(f), x)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (0, 3)])
def test_relu(shape):
    x = leaf(shape)
    assert torch.equal(relu(x), F.relu(x))
    assert gradcheck(relu, x)
    assert gradgradcheck(relu, x)
    assert gradgradcheck(third(relu), x)


def test_nothing_is_computed_of_a_second_derivative():
    x = leaf((2, 3, 6, 6))
    first = torch.autograd.grad((max_pool2d(relu(x), 2) ** 2).sum(), x, create_graph=True)[0]
    with torch.profiler.profile() as profile:
        torch.autograd.grad(first, x, torch.ones_like(x))
    zeros = {"aten::zeros", "aten::zeros_like", "aten::add", "aten::add_"}
    assert not zeros & {e.key for e in profile.key_averages()}


def test_a_models_own_layers_are_these():
    layers = (torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten())
    problem = fp.problem(torch.nn.Sequential(*layers).double(), fp.losses.mse)
    batch = normal((2, 1, 6, 6), 1), normal((2, 8), 2)
    run = fp.linearize(problem, problem.params, batch)
    run.hvp(problem.params)
    with torch.profiler.profile() as profile:
        run.hvp(problem.params)
    assert not {"aten::zeros", "aten::zeros_like"} & {e.key for e in profile.key_averages()}


def test_transforms_and_writing_in_place_are_torchs_own():
    x = normal((4, 2, 6, 6), 1)
    assert torch.equal(torch.vmap(lambda y: max_pool2d(relu(y), 2))(x), F.max_pool2d(F.relu(x), 2))
    tangent = torch.func.jvp(lambda y: max_pool2d(relu(y), 2), (x,), (x,))[1]
    assert_close(tangent, F.max_pool2d(F.relu(x), 2))
    y = x.clone()
    assert relu(y, inplace=True) is y
    assert torch.equal(y, F.relu(x))
