"""SPRING against its definition as a least-squares problem, and against its limits."""

import pytest
import torch

import funcprecond as fp
from tests import problems, reference
from tests.equality import assert_close
from tests.problems import Toy, normal
from tests.scientific import jacobian, linear, poisson, poisson1d, poisson_residual, push

N, P, LAM, MU = 7, 12, 1e-2, 0.9


def one(a, b, theta, last, *, damping=LAM, decay=MU):
    """The direction of one step on ``½ ‖A θ - b‖²`` from a given last direction."""
    problem, batch = linear(a, b, theta)
    opt = fp.spring(damping=damping, decay=decay)
    state = type(opt.init(problem.params))({"theta": last})
    evidence = fp.observe(problem, problem.params, batch, opt.needs(0))
    state, direction = opt.update(state, evidence.grads, evidence)
    torch.testing.assert_close(state.direction["theta"], direction["theta"])
    return direction["theta"]


def case(rows=N):
    a, b, theta, last = normal((rows, P), 1), normal((rows,), 2), normal((P,), 3), normal((P,), 4)
    return a, b, theta, last, a @ theta - b


@pytest.mark.parametrize("rows", [N, 20])
def test_it_is_least_squares_with_the_last_direction_as_the_prior(rows):
    a, b, theta, last, r = case(rows)
    found = one(a, b, theta, last)
    matrix = a.T @ a + LAM * reference.eye(P)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, a.T @ r + LAM * MU * last))
    torch.testing.assert_close(found, MU * last + push(a, r - MU * a @ last, LAM))


def test_without_decay_it_is_engd():
    a, b, theta, last, r = case()
    torch.testing.assert_close(one(a, b, theta, last, decay=0.0), push(a, r, LAM))


def test_small_damping_replaces_what_the_batch_sees_and_keeps_the_rest():
    a, b, theta, last, r = case()
    pinv = torch.linalg.pinv(a)
    expected = pinv @ r + MU * (last - pinv @ (a @ last))
    torch.testing.assert_close(
        one(a, b, theta, last, damping=1e-12), expected, rtol=1e-8, atol=1e-8
    )


def test_large_damping_is_a_heavy_ball():
    a, b, theta, last, r = case()
    expected = MU * last + a.T @ r / 1e8
    found = one(a, b, theta, last, damping=1e8)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    start = torch.zeros_like(last)
    found = one(a, b, theta, start, damping=1e8)
    torch.testing.assert_close(found, a.T @ r / 1e8, rtol=1e-6, atol=0)


def test_on_one_batch_the_limit_has_a_smaller_damping():
    a, b, theta, last, r = case()
    problem, batch = linear(a, b, theta)
    opt = fp.spring(damping=1.0, decay=MU)
    state = opt.init(problem.params)
    evidence = fp.observe(problem, problem.params, batch, opt.needs(0))
    for _ in range(250):
        state, direction = opt.update(state, evidence.grads, evidence)
    expected = push(a, r, (1 - MU) * 1.0)
    torch.testing.assert_close(direction["theta"], expected, rtol=1e-6, atol=1e-8)


def test_the_state_does_not_depend_on_the_scale_of_the_loss():
    a, b, theta, last, _ = case()
    scaled = one(5 * a, 5 * b, theta, last, damping=25 * LAM)
    torch.testing.assert_close(scaled, one(a, b, theta, last))


def kaczmarz(decay, steps=60):
    """Blocks of 4 of 40 consistent equations: the error, and that in the newest block."""
    a, solution = normal((40, P), 5), normal((P,), 6)
    problem, _ = linear(a[:4], a[:4] @ solution, torch.zeros(P, dtype=torch.float64))
    opt, g = fp.spring(damping=1e-10, decay=decay), problems.seeded(3)
    step, params, state = fp.make_step(problem, opt), problem.params, opt.init(problem.params)
    for t in range(steps):
        i = torch.randperm(40, generator=g)[:4]
        params, state, _ = step(params, state, {"rows": (a[i], a[i] @ solution)}, t)
        newest = (a[i] @ (params["theta"] - solution)).norm()
    length = 1 + state.direction["theta"].norm()
    return float((params["theta"] - solution).norm()), float(newest / length)


def test_consistent_equations_are_solved_as_by_kaczmarz():
    (plain, first), (some, second), (much, third) = map(kaczmarz, (0.0, 0.3, 0.99))
    assert max(first, second, third) < 1e-7
    assert some < plain < much


def test_a_bound_on_the_step_is_a_chain():
    a, b, theta, _, _ = case()
    problem, batch = linear(a, b, theta)
    toy = Toy(problem, (batch,))
    phi = reference.ravel(problems.update(toy, fp.spring())[1])
    for bound in (1e-3, 1e3):
        opt = fp.chain(fp.spring(), fp.scale(0.05), fp.clip_norm(bound**0.5))
        found = reference.ravel(problems.update(toy, opt)[1])
        rate = min(0.05, bound**0.5 / float(phi.norm()))
        torch.testing.assert_close(found, rate * phi)


@pytest.mark.parametrize("n", [5, 2])
def test_three_steps_on_poissons_equation_are_the_dense_ones(n):
    problem, batch = poisson(n=n)
    opt = fp.spring(damping=1e-3, decay=0.8)
    params, state = problem.params, opt.init(problem.params)
    phi = torch.zeros_like(reference.ravel(params))
    for t in range(3):
        evidence = fp.observe(problem, params, batch, opt.needs(t))
        state, direction = opt.update(state, evidence.grads, evidence)
        j = jacobian(lambda p: poisson_residual(p, batch), params)
        r = poisson_residual(params, batch)
        phi = 0.8 * phi + push(j, r - 0.8 * j @ phi, 1e-3)
        assert_close(direction, reference.unravel(phi, params), rtol=1e-6)
        params = fp.apply(params, direction, 0.1)


def test_another_gradient_takes_the_general_form():
    problem, batch = poisson(n=2)
    opt = fp.spring(damping=1e-2)
    state = opt.init(problem.params)
    evidence = fp.observe(problem, problem.params, batch, opt.needs(0))
    state, _ = opt.update(state, evidence.grads, evidence)
    copies = {k: g.clone() for k, g in evidence.grads.items()}
    first, second = (opt.update(state, g, evidence) for g in (copies, evidence.grads))
    assert_close(first, second, rtol=1e-6)


def test_it_solves_poissons_equation_with_a_small_step():
    problem, batch, error = poisson1d()
    opt = fp.chain(fp.spring(damping=1e-6, decay=0.5), fp.scale(0.5))
    step, params, state = fp.make_step(problem, opt), problem.params, opt.init(problem.params)
    for t in range(100):
        params, state, _ = step(params, state, batch, t)
    assert error(params) < 1e-4
