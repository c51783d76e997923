"""SMW-GN against dense Gauss-Newton matrices."""

import pytest
import torch

import funcprecond as fp
from tests import reference
from tests.equality import assert_close
from tests.problems import convnet, mlp, regression, update
from tests.representation.test_gram import CASES, dense

LAM = 0.07


def solved(matrix, grads, lam=LAM):
    x = torch.linalg.solve(matrix + lam * reference.eye(len(matrix)), reference.ravel(grads))
    return reference.unravel(x, grads)


@pytest.mark.parametrize("make", [mlp, convnet, regression])
@pytest.mark.parametrize("examples", [None, 1, 3, 100])
def test_the_direction_is_the_dense_gauss_newton_step_of_the_first_examples(make, examples):
    toy = make()
    _, found, evidence = update(toy, fp.smw_gn(damping=LAM, examples=examples))
    part = tuple(x[:examples] for x in toy.batch)
    matrix = reference.ggn(toy.problem, toy.params, part)
    assert_close(found, solved(matrix, evidence.grads), rtol=1e-8)


@pytest.mark.parametrize("name", ["conv2d groups", "long sequence", "used twice", "any shapes"])
@pytest.mark.parametrize("method", [fp.smw_ng, fp.smw_gn])
def test_parts_of_a_batch_of_all_kinds_of_layers(name, method):
    case = CASES[name]()
    _, found, evidence = update(case, method(damping=LAM, examples=2, adapt=False))
    inputs, targets = case.batch
    if method is fp.smw_ng:
        rows = dense(case)[:2] * (len(inputs) / 2) ** 0.5
        matrix = rows.T @ rows
    else:
        matrix = reference.ggn(case.problem, case.params, (inputs[:2], targets[:2]))
    assert_close(found, solved(matrix, evidence.grads), rtol=1e-8)


def test_the_damping_follows_the_reduction_of_the_loss():
    toy, factors = mlp(), set()
    for lam in (1e-3, 10.0):
        state, direction, evidence = update(toy, fp.smw_gn(damping=lam, factor=1.5))
        matrix, p = reference.ggn(toy.problem, toy.params, toy.batch), -reference.ravel(direction)
        model = reference.ravel(evidence.grads) @ p + p @ matrix @ p / 2 + lam * p @ p / 2
        x, y = toy.batch
        after = toy.problem.loss(toy.problem(fp.apply(toy.params, direction), x), y)
        ratio = float((after - evidence.loss) / model)
        factor = 1.5 if ratio < 0.25 else 1 / 1.5 if ratio > 0.75 else 1.0
        torch.testing.assert_close(float(state.damping), lam * factor)
        factors.add(factor)
    assert 1 / 1.5 in factors


def test_it_says_what_is_wrong():
    for options, match in (
        ({"damping": 0.0}, "positive"),
        ({"examples": 0}, "examples"),
        ({"factor": 0.5}, "factor"),
    ):
        with pytest.raises(ValueError, match=match):
            fp.smw_gn(**options)
    problem = fp.problem(torch.nn.Linear(2, 2), lambda outputs, targets: outputs.square().mean())
    with pytest.raises(TypeError, match="likelihood"):
        fp.observe(problem, problem.params, (torch.ones(3, 2),) * 2, fp.smw_gn().needs(0))
