"""Derivatives that would be lost without an error are refused."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import funcprecond as fp
from tests.equality import assert_close
from tests.problems import initialised, normal

X, Y = normal((4, 3), 1), torch.tensor([0, 1, 1, 0])


class Sine(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class Once(Sine):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class OfNumpy(Sine):
    @staticmethod
    def backward(ctx, g):
        with torch.no_grad():
            return g * torch.from_numpy(np.cos(ctx.saved_tensors[0].detach().numpy()))


class Net(nn.Module):
    def __init__(self, f=torch.sin):
        super().__init__()
        self.a, self.b, self.f = nn.Linear(3, 4), nn.Linear(4, 2), f

    def forward(self, x):
        return self.b(self.f(self.a(x)))


def of(module):
    problem = fp.problem(initialised(module), fp.losses.cross_entropy)
    return problem, problem.params, (X, Y)


PRODUCTS = {
    "jvp": lambda *data: fp.jvp(*data, data[1]),
    "ggn_mv": lambda *data: fp.ggn_mv(*data, data[1]),
    "hvp": lambda *data: fp.hvp(*data, data[1]),
    "hvp of a function": lambda problem, params, batch: fp.hvp(
        lambda p: problem.loss(problem(p, batch[0]), batch[1]), params, params
    ),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_custom_function_gives_the_products_of_torchs(product):
    expected = PRODUCTS[product](*of(Net()))
    assert_close(PRODUCTS[product](*of(Net(Sine.apply))), expected, rtol=1e-12)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("f", [Once, OfNumpy])
def test_a_backward_that_is_a_constant_is_refused_where_it_is_differentiated(f, product):
    with pytest.raises(NotImplementedError, match=f"function {f.__name__} cannot .* twice"):
        PRODUCTS[product](*of(Net(f.apply)))


@pytest.mark.parametrize("f", [Once, OfNumpy])
def test_such_a_function_serves_where_gradients_are_enough(f):
    options = {"kind": "kfac", "labels": "empirical"}
    expected = fp.KroneckerFactored(*of(Net()), **options).to_dense()
    assert_close(fp.KroneckerFactored(*of(Net(f.apply)), **options).to_dense(), expected)
    found, expected = (fp.observe(*of(Net(g))).grads for g in (f.apply, torch.sin))
    assert_close(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_is_refused_in_a_function_too(reentrant):
    def f(p):
        return checkpoint(torch.sin, p["x"], use_reentrant=reentrant).sum()

    x = {"x": normal((3,))}
    with pytest.raises(RuntimeError, match="activation checkpointing"):
        fp.hvp(f, x, x)


def problem_of(f, params):
    return fp.problem(lambda p, x: f(p), lambda outputs, y: outputs.sum(), params=params)


@pytest.mark.parametrize(
    "call",
    [
        lambda f, x: fp.hvp(lambda p: f(p).sum(), x, x),
        lambda f, x: fp.jvp(f, x, x),
        lambda f, x: fp.vjp(f, x, torch.ones(3)),
        lambda f, x: fp.observe(
            fp.problem(lambda p, i: f(p), lambda o, y: o.sum(), params=x), x, (X, Y)
        ),
    ],
)
def test_nothing_is_differentiated_under_inference_mode(call):
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch\.no_grad instead"):
        call(lambda p: p["x"] ** 3, {"x": torch.ones(3)})


def test_a_tensor_that_requires_a_gradient_is_no_part_of_a_loss_unless_it_is_a_parameter():
    a, params = torch.tensor(2.0, requires_grad=True), {"w": torch.ones(3)}
    problem = fp.problem(lambda p, x: x @ p["w"], lambda o, y: a * o.sum(), params=params)
    batch = X.float(), Y
    with pytest.raises(ValueError, match=r"tensor of the shape \(\) .* no parameter"):
        fp.observe(problem, params, batch)
    with pytest.raises(ValueError, match="pass it as a part of the batch"):
        fp.hvp(lambda p: a * p["w"].sum() ** 2, params, params)
    with torch.no_grad():
        fp.observe(problem, params, batch)
    passed = fp.problem(lambda p, x: x @ p["w"], lambda o, y: y[1] * o.sum(), params=params)
    loss = fp.observe(passed, params, (batch[0], (Y, a))).loss
    assert_close(torch.autograd.grad(loss, a)[0], loss.detach() / 2)


def test_points_in_which_a_model_differentiates_are_its_own():
    points = normal((4, 3), 2).requires_grad_()

    def slope(p):
        return torch.autograd.grad((points @ p["w"]).tanh().sum(), points, create_graph=True)[0]

    params = {"w": normal((3,), 3)}
    problem = fp.problem(lambda p, x: slope(p), lambda o, y: o.square().sum(), params=params)
    fp.observe(problem, params, (X, Y))

    def gradient(s):
        w = params["w"] + s * params["w"]
        return torch.func.grad(
            lambda w: ((1 - (points.detach() @ w).tanh() ** 2)[:, None] * w).square().sum()
        )(w)

    expected = (gradient(1e-5) - gradient(-1e-5)) / 2e-5
    found = fp.hvp(lambda p: slope(p).square().sum(), params, params)["w"]
    assert_close(found, expected, rtol=1e-6, atol=1e-6)


class Closure(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.run = lambda x: self.layer(x)

    def forward(self, x):
        return self.run(x)


class Clamped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        with torch.no_grad():
            self.layer.weight.clamp_(-0.1, 0.1)
        return self.layer(x)


@pytest.mark.parametrize("needs", [(), fp.kflr().needs(0)])
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Closure, "its parameter 'layer.weight' otherwise than .* use self"),
        (Clamped, "its parameter 'layer.weight' in place"),
        (lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), "its input 0 in place"),
    ],
)
def test_a_model_that_uses_or_changes_what_is_not_its_own_is_refused(module, message, needs):
    problem, params, (x, y) = of(module())
    with pytest.raises((ValueError, RuntimeError), match=message):
        fp.observe(problem, params, (x.clone(), y), needs)
