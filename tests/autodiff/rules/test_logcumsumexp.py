"""Cumulative log-sum-exp, whose pull-back in torch is not linear at zero."""

import pytest
import torch

import funcprecond as fp
from funcprecond.autodiff.rules.logcumsumexp import logcumsumexp
from tests import reference
from tests.equality import assert_close
from tests.problems import normal


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_values_are_torchs_also_where_they_would_overflow(dim):
    for x in (normal((3, 4)), 1e3 * normal((3, 4)), normal((3, 4)) - 2e3):
        assert_close(logcumsumexp(x, dim), torch.logcumsumexp(x, dim), rtol=1e-12)


def test_products_of_a_model_with_it_are_those_of_its_jacobian():
    def model(p, x):
        return torch.logcumsumexp(x @ p["w"], -1)

    params = {"w": normal((3, 4), 1)}
    problem = fp.problem(model, fp.losses.mse, params=params)
    batch = normal((5, 3), 2), normal((5, 4), 3)
    j = reference.jacobian(lambda p: model(p, batch[0]), params)
    v = {"w": normal((3, 4), 4)}
    assert_close(fp.jvp(problem, params, batch, v).reshape(-1), j @ v["w"].reshape(-1), rtol=1e-9)
    ggn = fp.GGN(problem, params, batch)
    assert_close(ggn.to_dense(), reference.ggn(problem, params, batch), rtol=1e-9)
