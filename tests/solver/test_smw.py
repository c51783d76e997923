"""Woodbury's identity against dense solves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprecond.linalg import treemath
from funcprecond.representation.gram import Gram
from funcprecond.solver.smw import SMW
from tests.problems import normal
from tests.reference import eye
from tests.strategies import seeds


def rows(count, shapes, seed=0, scale=0.3, dtype=torch.float64, decay=1.0):
    explicit = {
        k: normal((count, *shape), seed + i, dtype) * decay
        for i, (k, shape) in enumerate(shapes.items())
    }
    return Gram((), explicit, torch.tensor(scale, dtype=dtype), tuple(shapes))


SHAPES = {"w": (3, 2), "b": (), "k": (2, 1, 2)}


def vector(seed, dtype=torch.float64):
    return {k: normal(shape, seed + i, dtype) for i, (k, shape) in enumerate(SHAPES.items())}


@given(st.integers(1, 15), st.sampled_from([1e-3, 0.1, 10.0]), seeds)
def test_any_vector_equals_the_dense_solve(count, damping, seed):
    u = rows(count, SHAPES, seed)
    g = vector(seed + 5)
    solver = SMW(damping)
    found = treemath.ravel(solver.apply(solver.prepare(u), g))
    dense = u.to_dense() + damping * eye(11)
    expected = torch.linalg.solve(dense, treemath.ravel(g))
    assert (found - expected).norm() <= 1e-9 * expected.norm()


# More rows than the 11 parameters depend on each other, and their part without a gradient cancels.
@given(st.integers(1, 9), st.sampled_from([1e-6, 0.1, 10.0]), seeds)
def test_a_vector_in_the_span_equals_the_dense_solve_without_cancellation(count, damping, seed):
    u, y = rows(count, SHAPES, seed), normal((count,), seed + 9)
    solver = SMW(damping)
    found = treemath.ravel(solver.push_through(solver.prepare(u), y, vector(0)))
    dense = u.to_dense() + damping * eye(11)
    expected = torch.linalg.solve(dense, u.rows().T @ y)
    # What is left is the dense solve's own error, by its condition number.
    assert (found - expected).norm() <= 1e-15 * torch.linalg.cond(dense) * expected.norm() + 1e-12


def test_the_two_forms_agree_and_one_of_them_survives_a_small_damping():
    u, y = rows(6, SHAPES, dtype=torch.float32), normal((6,), 3, torch.float32)
    g = u.rmatvec(y)
    wide = Gram((), {k: x.double() for k, x in u.others.items()}, u.scale.double(), u.names)
    error = {}
    for damping in (1.0, 1e-5):
        solver = SMW(damping)
        dense = wide.to_dense() + damping * eye(11)
        expected = torch.linalg.solve(dense, wide.rows().T @ y.double())
        for name, found in (
            ("general", solver.apply(solver.prepare(u), g)),
            ("through", solver.push_through(solver.prepare(u), y, g)),
        ):
            error[name, damping] = float(
                (treemath.ravel(found) - expected).norm() / expected.norm()
            )
    assert max(error["general", 1.0], error["through", 1.0]) < 1e-5
    assert error["through", 1e-5] < 1e-4 < error["general", 1e-5]


def test_a_large_damping_is_gradient_descent_and_the_null_space_is_only_divided():
    u, g = rows(3, SHAPES), vector(7)
    solver = SMW(1e9)
    torch.testing.assert_close(
        1e9 * treemath.ravel(solver.apply(solver.prepare(u), g)),
        treemath.ravel(g),
        rtol=1e-7,
        atol=0,
    )
    q = torch.linalg.svd(u.rows())[2][-1]
    solver = SMW(0.2)
    found = treemath.ravel(solver.apply(solver.prepare(u), treemath.unravel(q, g)))
    torch.testing.assert_close(found, q / 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rows_and_no_damping_to_speak_of_still_have_a_factor(dtype):
    one = rows(1, SHAPES, dtype=dtype, scale=1.0)
    u = Gram(
        (), {k: x.expand(40, *x.shape[1:]) for k, x in one.others.items()}, one.scale, one.names
    )
    factor = SMW(1e-30).prepare(u)
    assert torch.isfinite(factor.cholesky).all()
    floor = torch.finfo(dtype).eps * u.gram().diagonal().double().sum()
    torch.testing.assert_close(factor.damping, floor, rtol=1e-6, atol=0)


def test_directions_have_the_dtypes_of_the_gradient():
    u, g = rows(3, SHAPES, dtype=torch.float32), vector(7, torch.bfloat16)
    solver = SMW(0.1)
    for found in (
        solver.apply(solver.prepare(u), g),
        solver.push_through(solver.prepare(u), torch.ones(3), g),
    ):
        assert {x.dtype for x in found.values()} == {torch.bfloat16}


def test_a_matrix_that_is_not_finite_does_not_raise():
    u = rows(3, SHAPES)
    broken = Gram((), {k: x * torch.nan for k, x in u.others.items()}, u.scale, u.names)
    solver = SMW(0.1)
    assert treemath.ravel(solver.apply(solver.prepare(broken), vector(1))).isnan().any()
