import pytest
import torch
from hypothesis import given

from funcprecond.solver.cg import Stop
from funcprecond.solver.minres import minres
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
