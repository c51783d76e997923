"""``hvp``, ``jvp``, ``vjp`` and ``ggn_mv`` take one form for functions and one for problems."""

import pytest
import torch
from torch.func import functional_call, grad, jacrev, vmap

import funcprecond as fp
from tests import reference
from tests.equality import assert_close
from tests.problems import mlp, normal


def model(params):
    return torch.stack([params["a"].sin().sum() * params["b"], params["b"].exp() + params["a"][0]])


def point():
    return {"a": normal((3,), 1), "b": normal((), 2)}


VECTOR = {"a": normal((3,), 3), "b": normal((), 4)}


def flat_jacobian():
    return reference.jacobian(model, point())


def test_the_hessian_of_a_function():
    def f(params):
        return model(params).square().sum()

    expected = reference.hessian(f, point()) @ reference.ravel(VECTOR)
    assert_close(reference.ravel(fp.hvp(f, point(), VECTOR)), expected, rtol=1e-10)


def test_the_jacobian_of_a_function_both_ways():
    j = flat_jacobian()
    assert_close(fp.jvp(model, point(), VECTOR), j @ reference.ravel(VECTOR), rtol=1e-10)
    u = normal((2,), 5)
    assert_close(reference.ravel(fp.vjp(model, point(), u)), j.T @ u, rtol=1e-10)


def test_the_gauss_newton_matrix_of_a_function():
    def loss(outputs):
        return outputs.pow(4).sum()

    h = jacrev(grad(loss))(model(point()))
    j = flat_jacobian()
    found = fp.ggn_mv(model, point(), VECTOR, loss=loss)
    assert_close(reference.ravel(found), j.T @ h @ j @ reference.ravel(VECTOR), rtol=1e-10)


def test_a_problem_is_the_function_of_its_parameters_on_a_batch():
    toy = mlp()
    x, y = toy.batch
    vector = {k: normal(tuple(p.shape), 6) for k, p in toy.params.items()}

    def outputs(params):
        return functional_call(toy.problem.module, params, (x,))

    def loss(f):
        return toy.problem.loss(f, y)

    whole = (toy.problem, toy.params, toy.batch)
    u = normal(tuple(outputs(toy.params).shape), 7)
    pairs = [
        (fp.hvp(*whole, vector), fp.hvp(lambda p: loss(outputs(p)), toy.params, vector)),
        (fp.jvp(*whole, vector), fp.jvp(outputs, toy.params, vector)),
        (fp.vjp(*whole, u), fp.vjp(outputs, toy.params, u)),
        (fp.ggn_mv(*whole, vector), fp.ggn_mv(outputs, toy.params, vector, loss=loss)),
    ]
    for of_problem, of_function in pairs:
        assert_close(of_problem, of_function, rtol=1e-10)


@pytest.mark.parametrize("product", [fp.hvp, fp.jvp, fp.vjp, fp.ggn_mv])
def test_the_wrong_number_of_arguments_is_answered_with_the_right_call(product):
    toy, name = mlp(), product.__name__
    with pytest.raises(TypeError, match=rf"{name}\(problem, params, batch, vector\)"):
        product(toy.problem, toy.params, toy.params)
    with pytest.raises(TypeError, match=rf"{name}\(f, params, vector\)"):
        product(model, point(), None, VECTOR)


def test_they_compose_with_transforms():
    def f(x):
        return (x**3).sum()

    xs, vs = normal((4, 3), 8), normal((4, 3), 9)
    found = vmap(lambda x, v: fp.hvp(f, x, v))(xs, vs)
    assert_close(found, 6 * xs * vs, rtol=1e-12)
    slope = grad(lambda x: fp.hvp(f, x, vs[0]).sum())(xs[0])
    assert_close(slope, 6 * vs[0], rtol=1e-12)
