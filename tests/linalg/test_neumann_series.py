import torch

from funcprecond.linalg.neumann_series import neumann
from funcprecond.linalg.solution import Stop
from tests import reference, strategies
from tests.equality import assert_close
from tests.problems import normal

M = strategies.with_spectrum(torch.linspace(0.2, 1.8, 6, dtype=torch.float64), 0)
B = normal((6,), 1)


def run(matrix=M, b=B, **options):
    return neumann(lambda v: {"x": matrix @ v["x"]}, {"x": b}, **options)


def test_a_fixed_number_of_terms_is_the_polynomial():
    found = run(tol=0.0, max_iter=7, scale=0.5)
    term = reference.eye(6) - 0.5 * M
    expected = 0.5 * sum(torch.linalg.matrix_power(term, j) for j in range(7)) @ B
    assert_close(found.solution["x"], expected, rtol=1e-12)
    assert_close(found.residual["x"], torch.linalg.matrix_power(term, 7) @ B, rtol=1e-11)
    assert int(found.iterations) == 7
    assert int(found.reason) == Stop.MAX_ITERATIONS


def test_it_converges_to_the_inverse_and_faster_with_a_preconditioner():
    plain = run(tol=1e-9)
    assert int(plain.reason) == Stop.RESIDUAL
    assert_close(plain.solution["x"], torch.linalg.solve(M, B), rtol=1e-7)
    inverse = torch.linalg.inv(M + 0.01 * reference.eye(6))
    quick = run(tol=1e-9, precondition=lambda r: {"x": inverse @ r["x"]})
    assert_close(quick.solution["x"], torch.linalg.solve(M, B), rtol=1e-7)
    assert int(quick.iterations) < int(plain.iterations) / 4


def test_divergence_and_nan_are_reported():
    assert int(run(scale=3.0).reason) == Stop.DIVERGED
    assert int(run(M * torch.nan).reason) == Stop.NOT_FINITE
    zero = run(b=torch.zeros_like(B))
    assert int(zero.reason) == Stop.RESIDUAL
    assert int(zero.iterations) == 0


def test_under_vmap_each_problem_stops_by_itself():
    scales = torch.tensor([0.5, 1.0], dtype=torch.float64)
    mapped = torch.vmap(lambda s: run(scale=s, tol=1e-6, max_iter=100))(scales)
    for i, s in enumerate(scales):
        one = run(scale=s, tol=1e-6, max_iter=100)
        assert_close(mapped.solution["x"][i], one.solution["x"], rtol=1e-12)
        assert int(mapped.iterations[i]) == int(one.iterations)
