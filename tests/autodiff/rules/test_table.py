"""One table of replaced derivatives serves both ways to differentiate twice."""

import pytest
import torch
import torch.nn.functional as F

import funcprecond as fp
from funcprecond.autodiff.rules.table import RULES, DifferentiatedTwice, replaced
from tests import reference
from tests.equality import assert_close
from tests.problems import normal


@pytest.mark.parametrize("function", RULES, ids=lambda f: getattr(f, "__name__", str(f)))
def test_the_mode_and_the_table_choose_the_same_function(function):
    assert replaced(function) is not function


def test_what_is_not_in_the_table_is_left_alone():
    for function in (torch.sin, F.softmax, torch.Tensor.exp):
        assert replaced(function) is function


def test_a_functions_hessian_is_that_of_its_layers_in_a_problem():
    """Weight norm's second derivative is one that torch gets wrong on a CPU."""
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2)).double()
    x, y = normal((4, 3), 1), torch.tensor([0, 1, 1, 0])
    problem = fp.problem(layer, fp.losses.cross_entropy)
    v = {k: normal(tuple(p.shape), 2) for k, p in problem.params.items()}

    def f(params):
        return F.cross_entropy(problem(params, x), y)

    expected = reference.difference(
        lambda p: reference.gradient(f, p, step=1e-4), problem.params, v, step=1e-4
    )
    assert_close(fp.hvp(f, problem.params, v), expected, rtol=1e-4, atol=1e-6)
    assert_close(fp.hvp(problem, problem.params, (x, y), v), expected, rtol=1e-4, atol=1e-6)


def test_the_mode_changes_no_value():
    x, w = normal((2, 3), 3), normal((4, 3), 4)
    with DifferentiatedTwice():
        found = F.gelu(F.linear(x, w))
    assert_close(found, F.gelu(x @ w.T), rtol=1e-12)
