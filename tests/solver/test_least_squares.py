"""The damped least squares against dense solves, through both of the matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcprecond as fp
from funcprecond.curvature import Residuals
from funcprecond.layers.blocks import Layers
from funcprecond.representation.gram import Gram
from funcprecond.solver import LeastSquares
from funcprecond.solver.least_squares import NormalEquations
from funcprecond.solver.smw import Woodbury
from tests import reference
from tests.problems import normal

SHAPES = {"w": (2, 3), "b": (), "v": (1, 4)}
PARAMS = {k: normal(s, i) for i, (k, s) in enumerate(SHAPES.items())}
SIZE = sum(p.numel() for p in PARAMS.values())


def case(rows, rank=None, seed=0):
    """J, as a matrix and as a representation."""
    j = normal((rows, SIZE), seed)
    if rank is not None:
        j = normal((rows, rank), seed) @ normal((rank, SIZE), seed + 1)
    parts = {k: torch.stack([reference.unravel(x, PARAMS)[k] for x in j]) for k in PARAMS}
    one = torch.ones((), dtype=torch.float64)
    layers = Layers({}, {k: x.unsqueeze(0) for k, x in parts.items()}, one)
    return j, layers


@given(rows=st.integers(1, 2 * SIZE), seed=st.integers(0, 99), damping=st.sampled_from([1e-3, 1.0]))
def test_both_matrices_give_the_dense_solution(rows, seed, damping):
    j, layers = case(rows, seed=seed)
    solver = LeastSquares(damping)
    factor = solver.prepare(Gram.from_layers(layers, PARAMS), PARAMS)
    assert isinstance(factor, Woodbury if rows < SIZE else NormalEquations)
    r, v = normal((rows,), seed + 5), reference.unravel(normal((SIZE,), seed + 6), PARAMS)
    matrix = j.T @ j + damping * reference.eye(SIZE)
    found = reference.ravel(solver.from_residual(factor, r, PARAMS))
    torch.testing.assert_close(found, torch.linalg.solve(matrix, j.T @ r), rtol=1e-8, atol=1e-9)
    found = reference.ravel(solver.apply(factor, v))
    expected = torch.linalg.solve(matrix, reference.ravel(v))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("rows", [5, 30])
def test_a_step_is_that_of_the_residual_or_of_the_given_gradient_over_its_multiple(rows):
    j, layers = case(rows)
    r, two = normal((rows,), 3), torch.full((), 2.0, dtype=torch.float64)
    grads = reference.unravel(2 * j.T @ r, PARAMS)
    solver = LeastSquares(0.1)
    factor = solver.prepare(Gram.from_layers(layers, PARAMS), PARAMS)
    expected = torch.linalg.solve(j.T @ j + 0.1 * reference.eye(SIZE), j.T @ r)
    for own, residual in ((True, r), (False, r), (True, r[:0])):
        measured = Residuals(layers, residual, two)
        found = reference.ravel(solver.step(factor, measured, grads, own))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rows", [8, 40])
def test_a_damping_below_rounding_still_gives_a_solution(rows):
    j, layers = case(rows, rank=4)
    solver = LeastSquares(1e-30)
    factor = solver.prepare(Gram.from_layers(layers, PARAMS), PARAMS)
    r = normal((rows,), 3)
    found = reference.ravel(solver.from_residual(factor, r, PARAMS))
    best = torch.linalg.pinv(j, rtol=1e-10) @ r
    assert (j @ (found - best)).norm() < 0.1 * (j @ best).norm()


def test_it_is_public():
    assert "LeastSquares" in fp.solver.__all__
