import pytest
import torch

import funcprecond as fp
from funcprecond.curvature.ggn import GGNOperator
from tests import problems, reference
from tests.equality import assert_close
from tests.problems import Toy, initialised, normal


def bce() -> Toy:
    toy = problems.regression()
    batches = tuple((x, (y > 0).double()) for x, y in toy.batches)
    return Toy(fp.problem(toy.problem.module, fp.losses.bce_with_logits), batches)


def custom() -> Toy:
    toy = problems.regression()
    loss = lambda f, y: (f - y).cosh().log().mean()  # noqa: E731
    return Toy(fp.problem(toy.problem.module, loss), toy.batches)


def sequences() -> Toy:
    x, y = normal((4, 2, 3)), torch.tensor([[0, 1], [2, -100], [1, 1], [0, 2]])
    return Toy(fp.problem(problems.mlp_module(), fp.losses.cross_entropy), ((x, y),))


TOYS = {
    "cross entropy": problems.mlp,
    "sequences": sequences,
    "mse": problems.regression,
    "bce": bce,
    "custom": custom,
    "convnet": problems.convnet,
}


@pytest.mark.parametrize("make", TOYS.values(), ids=TOYS.keys())
def test_the_product_is_that_of_the_dense_matrix(make):
    toy = make()
    g = reference.ggn(toy.problem, toy.params, toy.batch)
    v = normal((len(g),), 3)
    vector = reference.unravel(v, toy.params)
    product = fp.ggn_mv(toy.problem, toy.params, toy.batch, vector)
    assert_close(reference.ravel(product), g @ v, rtol=1e-9)
    operator = fp.observe(toy.problem, toy.params, toy.batch, (GGNOperator(),))[GGNOperator()]
    assert_close(operator(vector), product, rtol=1e-11)


@pytest.mark.parametrize("make", [problems.mlp, problems.convnet])
def test_for_a_softmax_it_is_the_fisher_matrix_label_by_label(make):
    toy = make()
    fisher = reference.fisher(toy.problem, toy.params, toy.batch)
    v = normal((len(fisher),), 3)
    product = fp.ggn_mv(toy.problem, toy.params, toy.batch, reference.unravel(v, toy.params))
    assert_close(reference.ravel(product), fisher @ v, rtol=1e-9)


def test_for_a_linear_model_it_is_the_hessian():
    module = initialised(torch.nn.Linear(3, 3))
    problem, batch = fp.problem(module, fp.losses.cross_entropy), problems.mlp().batch
    v = {"weight": normal((3, 3)), "bias": normal((3,), 1)}

    def loss(p):
        return problem.loss(problem(p, batch[0]), batch[1])

    expected = fp.hvp(loss, problem.params, v)
    assert_close(fp.ggn_mv(problem, problem.params, batch, v), expected, rtol=1e-10)
