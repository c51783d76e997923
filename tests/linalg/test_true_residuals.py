"""A success code means that the true residual is small, whatever the system; beside SciPy."""

import functools

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from funcprecond.linalg import Stop, cg, minres, neumann, truncated_cg
from funcprecond.linalg.true_residuals import unit
from tests import strategies
from tests.equality import assert_close, assert_same
from tests.problems import normal

SOLVERS = {
    "cg": functools.partial(cg, rule="none"),
    "minres": minres,
    "truncated_cg": functools.partial(truncated_cg, radius=1e30),
    "neumann": neumann,
}
kinds = st.sampled_from(["positive", "indefinite", "consistent", "inconsistent"])
dtypes = st.sampled_from([torch.float32, torch.float64])
conditions = st.sampled_from([1.0, 1e2, 1e4, 1e6, 1e8])
sizes = st.sampled_from([1e-30, 1e-12, 1.0, 1e12, 1e25])
tolerances = st.sampled_from([1e-2, 1e-5, 1e-10])


def system(kind, condition, dtype, seed, size=1.0, n=20):
    """A symmetric system in ``dtype``, whose matrix has the largest eigenvalue 1."""
    values = torch.logspace(0, -1, n, base=condition, dtype=torch.float64)
    if kind != "positive":
        values[1::3] *= -1
    if kind in ("consistent", "inconsistent"):
        values[5:8] = 0
    matrix, b = strategies.with_spectrum(values, seed), normal((n,), seed + 1)
    if kind == "consistent":
        b = matrix @ b
    matrix = ((matrix + matrix.T) / 2).to(dtype)
    return matrix, (b / b.norm()).to(dtype) * size


def relative(matrix, x, b, size):
    matrix, x, b = matrix.double(), x.double() / size, b.double() / size
    return ((b - matrix @ x).norm() / b.norm()).item()


def solve(name, matrix, b, **options):
    return SOLVERS[name](lambda v: {"x": matrix @ v["x"]}, {"x": b}, **options)


@pytest.mark.parametrize("name", list(SOLVERS))
@settings(max_examples=40)
@given(kinds, conditions, dtypes, sizes, tolerances, strategies.seeds)
@example("positive", 1e6, torch.float32, 1.0, 1e-5, 0)
@example("positive", 1e4, torch.float32, 1e-30, 1e-5, 0)
@example("inconsistent", 1e2, torch.float64, 1.0, 1e-5, 3)
def test_residual_means_the_true_residual(name, kind, condition, dtype, size, tol, seed):
    matrix, b = system(kind, condition, dtype, seed, size)
    found = solve(name, matrix, b, tol=tol, max_iter=120)
    true = relative(matrix, found.solution["x"], b, size)
    # The product that computes the residual has rounding errors of its own.
    rounding = torch.finfo(dtype).eps * (1 + (found.solution["x"].double() / size).norm().item())
    reason = int(found.reason)
    assert torch.isfinite(found.solution["x"]).all() or reason == Stop.DIVERGED
    if reason == Stop.RESIDUAL:
        assert true <= tol * (1 + 1e-3) + 10 * rounding
        assert found.solution["x"].any()
    if reason != Stop.DIVERGED and (name == "minres" or reason in (Stop.RESIDUAL, Stop.STALLED)):
        stated = (found.residual["x"].double() / size).norm().item() / (b.double() / size).norm()
        assert abs(stated - true) <= 1e-3 * true + 10 * rounding


@settings(max_examples=40)
@given(kinds, conditions, dtypes, strategies.seeds)
def test_minres_leaves_no_more_than_scipy_does(kind, condition, dtype, seed):
    matrix, b = system(kind, condition, dtype, seed)
    tol = 100 * torch.finfo(dtype).eps
    found = solve("minres", matrix, b, tol=tol, max_iter=400)
    theirs, _ = scipy.sparse.linalg.minres(matrix.numpy(), b.numpy(), rtol=tol, maxiter=400)
    ours = relative(matrix, found.solution["x"], b, 1.0)
    theirs = relative(matrix, torch.from_numpy(np.asarray(theirs)), b, 1.0)
    assert ours <= max(1.3 * theirs, tol * 1.01)


@settings(max_examples=30)
@given(st.sampled_from([1.0, 1e2, 1e3, 1e4]), dtypes, strategies.seeds)
def test_cg_leaves_no_more_than_scipy_does(condition, dtype, seed):
    matrix, b = system("positive", condition, dtype, seed)
    tol = 10 * torch.finfo(dtype).eps
    found = solve("cg", matrix, b, tol=tol, max_iter=400)
    theirs, _ = scipy.sparse.linalg.cg(matrix.numpy(), b.numpy(), rtol=tol, maxiter=400)
    ours = relative(matrix, found.solution["x"], b, 1.0)
    assert ours <= max(3 * relative(matrix, torch.from_numpy(theirs), b, 1.0), tol * 1.01)


@pytest.mark.parametrize("kind", ["consistent", "inconsistent"])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_minres_finds_least_squares_and_says_whether_they_solve(kind, condition):
    for seed in range(5):
        matrix, b = system(kind, condition, torch.float64, seed)
        found = solve("minres", matrix, b, tol=1e-6, max_iter=600)
        values, vectors = torch.linalg.eigh(matrix)
        null = vectors[:, values.abs() < 1e-12]
        least = (null.T @ b).norm()
        true = (b - matrix @ found.solution["x"]).norm()
        assert true <= least * (1 + 1e-3) + 1e-6
        assert int(found.reason) == (Stop.RESIDUAL if kind == "consistent" else Stop.STALLED)


@pytest.mark.parametrize("name", ["cg", "minres"])
def test_more_iterations_do_not_lose_what_was_reached(name):
    """A residual that was replaced in the recursion made it grow to 542 after 2000 iterations."""
    matrix, b = system("positive", 1e4, torch.float32, 0, n=60)
    reached = [
        relative(matrix, solve(name, matrix, b, max_iter=n, tol=1e-5).solution["x"], b, 1.0)
        for n in (300, 1000, 2000)
    ]
    assert max(reached[1:]) <= 4 * reached[0]
    assert reached[-1] < 1e-3


@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize("size", [1e-43, 1e-30, 1e25])
def test_a_tiny_or_huge_right_hand_side_is_a_multiple_of_another(name, size):
    b = torch.tensor([1.0, -3.0, 2.0], dtype=torch.float64)
    matrix = torch.diag(torch.tensor([1.0, 0.5, 0.25]))
    found = solve(name, matrix, (b * size).float(), tol=1e-4)
    assert int(found.reason) == Stop.RESIDUAL
    expected = b / torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    # A subnormal number has few digits.
    assert_close(found.solution["x"].double() / size, expected, rtol=0.02 if size < 1e-38 else 1e-3)


@pytest.mark.parametrize("name", ["cg", "minres"])
def test_vmapped_problems_with_failed_claims_end_as_single_ones_do(name):
    pairs = [system("positive", c, torch.float32, 0) for c in (1.0, 1e2, 1e4)]
    matrices, rights = (torch.stack(x) for x in zip(*pairs, strict=True))
    run = functools.partial(solve, name, tol=1e-5, max_iter=400)
    mapped = torch.vmap(run)(matrices, rights)
    for i, (matrix, b) in enumerate(pairs):
        alone = run(matrix, b)
        assert int(mapped.reason[i]) == int(alone.reason)
        ours = relative(matrix, mapped.solution["x"][i], b, 1.0)
        assert ours <= max(3 * relative(matrix, alone.solution["x"], b, 1.0), 1e-5)


@pytest.mark.parametrize("name", list(SOLVERS))
def test_the_derivative_of_a_solution_is_that_of_the_inverse(name):
    matrix, b = system("positive", 4.0, torch.float64, 0, n=5)
    other = normal((5,), 7)
    options = {"tol": 1e-14, "max_iter": 8 if name in ("cg", "minres") else 120}

    def value(scale):
        damped = matrix + scale * torch.eye(5, dtype=torch.float64)
        return other @ solve(name, damped, b, **options).solution["x"]

    scale = torch.tensor(0.3, dtype=torch.float64)
    inverse = torch.linalg.inv(matrix + scale * torch.eye(5, dtype=torch.float64))
    expected = -other @ inverse @ inverse @ b
    assert_close(torch.func.grad(value)(scale), expected, rtol=1e-5)
    leaf = scale.clone().requires_grad_()
    assert_close(torch.autograd.grad(value(leaf), leaf)[0], expected, rtol=1e-5)


@pytest.mark.parametrize(("name", "extra"), [("cg", 1), ("minres", 1), ("neumann", 1)])
def test_the_check_costs_one_product(name, extra):
    matrix, b = system("positive", 4.0, torch.float64, 0)
    calls = []

    def product(v):
        calls.append(1)
        return {"x": matrix @ v["x"]}

    found = SOLVERS[name](product, {"x": b}, tol=1e-6)
    assert int(found.reason) == Stop.RESIDUAL
    assert len(calls) == int(found.iterations) + extra


@given(st.floats(1e-38, 1e38), strategies.seeds)
def test_the_unit_is_the_power_of_two_below(size, seed):
    b = {"a": normal((3,), seed) * 0.1, "b": torch.tensor([size, -size / 3], dtype=torch.float64)}
    found = unit(b).item()
    assert np.frexp(found)[0] == 0.5
    largest = max(size, b["a"].abs().max().item())
    assert found <= largest < 2 * found


def test_the_unit_of_nothing_is_one():
    for b in ({"a": torch.zeros(2)}, {"a": torch.zeros(0)}, {"a": torch.full((1,), torch.nan)}):
        assert_same(unit(b), torch.ones(()))
