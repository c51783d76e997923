import pytest
import torch
from hypothesis import given

from funcprecond.linalg.minimal_residual import minres
from funcprecond.linalg.solution import Stop
from tests import reference, strategies
from tests.equality import assert_close, assert_same, copy
from tests.problems import normal


def run(matrix, b, **options):
    found = minres(lambda v: {"x": matrix @ v["x"]}, {"x": b}, **options)
    return found.solution["x"], found


def krylov(matrix, b, k):
    """An orthonormal basis of the first k Krylov vectors."""
    basis = []
    v = b
    for _ in range(k):
        for q in basis * 2:
            v = v - q * (q @ v)
        basis.append(v / v.norm())
        v = matrix @ basis[-1]
    return torch.stack(basis, 1)


@pytest.mark.parametrize("indefinite", [False, True])
def test_every_iterate_has_the_least_residual_of_its_krylov_space(indefinite):
    values = torch.linspace(0.3, 2.0, 8, dtype=torch.float64)
    if indefinite:
        values[::3] *= -1
    m, b = strategies.with_spectrum(values, 0), normal((8,), 1)
    last = torch.inf
    for k in range(1, 9):
        x, found = run(m, b, max_iter=k, tol=1e-14)
        v = krylov(m, b, k)
        y = torch.linalg.lstsq(m @ v, b.unsqueeze(1)).solution.squeeze(1)
        residual = (b - m @ x).norm()
        assert abs(residual - (b - m @ (v @ y)).norm()) < 1e-10
        assert residual <= last * (1 + 1e-12)
        assert_close(found.residual["x"], b - m @ x, atol=1e-12)
        last = residual
    assert last < 1e-10


def test_a_singular_system_gets_its_shortest_solution():
    values = torch.tensor([2.0, -1.0, 0.5, 0.0, 0.0, 1.5], dtype=torch.float64)
    m = strategies.with_spectrum(values, 3)
    b = m @ normal((6,), 2)
    x, found = run(m, b, tol=1e-12)
    assert_close(x, torch.linalg.pinv(m) @ b, rtol=1e-9)
    assert int(found.reason) == Stop.RESIDUAL


def test_an_inconsistent_system_stops_at_least_squares_and_says_so():
    values = torch.tensor([2.0, -1.0, 0.5, 0.0, 0.0, 1.5], dtype=torch.float64)
    m, b = strategies.with_spectrum(values, 3), normal((6,), 2)
    x, found = run(m, b, tol=1e-8)
    assert int(found.reason) == Stop.STALLED
    least = b - m @ torch.linalg.pinv(m) @ b
    assert_close(b - m @ x, least, rtol=1e-6)


@given(strategies.spd(), strategies.seeds)
def test_on_positive_definite_systems_it_solves(m, seed):
    b = normal((len(m),), seed)
    x, found = run(m, b, tol=1e-9, max_iter=500)
    assert (b - m @ x).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize("indefinite", [False, True])
def test_with_a_preconditioner_each_iterate_is_the_least_in_its_norm(indefinite):
    """Of ``L^T B L y = L^T b`` with ``x = L y`` and ``M^-1 = L L^T``, solved without one."""
    values = torch.linspace(0.3, 2.0, 8, dtype=torch.float64)
    if indefinite:
        values[::3] *= -1
    m, b = strategies.with_spectrum(values, 0), normal((8,), 1)
    inverse = strategies.with_spectrum(torch.logspace(-1, 1, 8, dtype=torch.float64), 5)
    low = torch.linalg.cholesky(inverse)
    for k in range(1, 9):
        options = {"max_iter": k, "tol": 1e-13}
        x, found = run(m, b, precondition=lambda r: {"x": inverse @ r["x"]}, **options)
        y, _ = run(low.T @ m @ low, low.T @ b, **options)
        assert_close(x, low @ y, rtol=1e-7)
        assert_close(found.residual["x"], b - m @ x, atol=1e-12)
    assert (b - m @ x).norm() < 1e-7 * b.norm()


def test_an_ill_conditioned_system_is_not_taken_for_one_without_solution():
    values = torch.logspace(-4, 0, 30, dtype=torch.float64)
    m, b = strategies.with_spectrum(values, 0), normal((30,), 1)
    x, found = run(m, b, tol=0.02, max_iter=500)
    assert int(found.reason) == Stop.RESIDUAL
    assert (b - m @ x).norm() <= 0.02 * b.norm()


def test_its_tolerance_is_on_the_residual_itself_whatever_the_preconditioner():
    """Which rises and falls, while in the preconditioner's norm it falls."""
    m = strategies.with_spectrum(torch.linspace(-3, 8, 20, dtype=torch.float64), 0)
    inverse = torch.diag(torch.logspace(-1, 1, 20, dtype=torch.float64))
    b = normal((20,), 1)
    precondition = lambda r: {"x": inverse @ r["x"]}  # noqa: E731
    lengths = []
    for k in range(1, 16):
        x, _ = run(m, b, precondition=precondition, max_iter=k, tol=0.0)
        lengths.append((b - m @ x).norm() / b.norm())
    for length in lengths:
        tol = length * (1 + 1e-9)
        _, found = run(m, b, precondition=precondition, tol=tol)
        first = next(k for k, other in enumerate(lengths, 1) if other <= tol)
        assert int(found.iterations) == (0 if tol >= 1 else first)


def test_the_inverse_of_the_absolute_matrix_needs_two_iterations():
    values = torch.logspace(-4, 0, 20, dtype=torch.float64) * (-1.0) ** torch.arange(20)
    m, inverse = (strategies.with_spectrum(x, 3) for x in (values, 1 / values.abs()))
    _, found = run(m, normal((20,), 1), precondition=lambda r: {"x": inverse @ r["x"]}, tol=1e-8)
    assert int(found.iterations) == 2


def test_a_preconditioner_that_is_not_positive_is_reported():
    for sign in (-1.0, torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)):
        x, found = run(
            reference.eye(3) * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
            torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64),
            precondition=lambda r, sign=sign: {"x": sign * r["x"]},
        )
        assert int(found.reason) == Stop.NOT_POSITIVE
        assert torch.isfinite(x).all()


def test_a_warm_start_and_a_zero_right_hand_side():
    m, b = reference.eye(4) * 2, normal((4,), 1)
    _, found = run(m, b, x0={"x": b / 2})
    assert int(found.iterations) == 0
    assert int(found.reason) == Stop.RESIDUAL
    x, found = run(m, torch.zeros(4, dtype=torch.float64))
    assert_same(x, torch.zeros(4, dtype=torch.float64))
    assert int(found.reason) == Stop.RESIDUAL


def test_a_nan_is_reported_and_does_not_enter_the_solution():
    x, found = run(torch.full((3, 3), torch.nan, dtype=torch.float64), normal((3,)))
    assert int(found.reason) == Stop.NOT_FINITE
    assert_same(x, torch.zeros(3, dtype=torch.float64))


def test_under_vmap_each_problem_stops_by_itself():
    m = torch.stack([strategies.with_spectrum(normal((5,), i), i) for i in range(3)])
    b = normal((3, 5), 9)
    before = copy((m, b))
    solve = lambda a, c: minres(  # noqa: E731
        lambda v: {"x": a @ v["x"]}, {"x": c}, tol=1e-9, max_iter=20
    )
    mapped = torch.vmap(solve)(m, b)
    for i in range(3):
        x, found = run(m[i], b[i], tol=1e-9, max_iter=20)
        assert_close(mapped.solution["x"][i], x, rtol=1e-8)
        assert int(mapped.iterations[i]) == int(found.iterations)
    assert_same((m, b), before)
