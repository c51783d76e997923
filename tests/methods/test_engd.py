"""ENGD against dense damped Gauss-Newton steps, on Poisson's equation and linear problems."""

import pytest
import torch

import funcprecond as fp
from funcprecond.linalg import treemath
from tests import problems, reference
from tests.equality import assert_close, finite
from tests.problems import Toy, normal
from tests.scientific import jacobian, linear, poisson, poisson1d, poisson_residual, push

LAM = 1e-3


def first(problem, batch, params=None, **options):
    toy = Toy(problem, (batch,))
    return problems.update(toy, fp.engd(**options), params=params)


def dense(params, batch):
    return jacobian(lambda p: poisson_residual(p, batch), params), poisson_residual(params, batch)


# 25 + 20 rows and 33 parameters; 4 + 8 rows.
@pytest.mark.parametrize("n", [5, 2])
def test_the_direction_is_the_dense_gauss_newton_step(n):
    problem, batch = poisson(n=n)
    j, r = dense(problem.params, batch)
    assert (len(j) < j.shape[1]) == (n == 2)
    _, direction, evidence = first(problem, batch, damping=LAM, search="none")
    normal_matrix = j.T @ j + LAM * reference.eye(j.shape[1])
    expected = torch.linalg.solve(normal_matrix, j.T @ r)
    torch.testing.assert_close(reference.ravel(direction), expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(expected, push(j, r, LAM), rtol=1e-7, atol=1e-9)
    stacked = torch.cat([j, LAM**0.5 * reference.eye(j.shape[1])])
    right = torch.cat([r, torch.zeros(j.shape[1], dtype=r.dtype)]).unsqueeze(1)
    solution = torch.linalg.lstsq(stacked, right, driver="gelsd").solution[:, 0]
    torch.testing.assert_close(reference.ravel(direction), solution, rtol=1e-7, atol=1e-9)
    # The change that the damped quadratic model predicts.
    d = solution
    model = (r - j @ d).square().sum() / 2 + LAM * d @ d / 2 - r @ r / 2
    torch.testing.assert_close(model, -treemath.dot(evidence.grads, direction) / 2)


def test_another_gradient_and_the_squared_loss_of_examples():
    problem, batch = poisson(n=2)
    j, _ = dense(problem.params, batch)
    opt = fp.engd(damping=LAM, search="none")
    evidence = fp.observe(problem, problem.params, batch, opt.needs(0))
    other = {k: normal(p.shape, i) for i, (k, p) in enumerate(problem.params.items())}
    _, direction = opt.update(opt.init(problem.params), other, evidence)
    matrix = j.T @ j + LAM * reference.eye(j.shape[1])
    expected = torch.linalg.solve(matrix, reference.ravel(other))
    torch.testing.assert_close(reference.ravel(direction), expected, rtol=1e-6, atol=1e-8)
    toy = problems.regression()
    _, direction, evidence = problems.update(toy, opt)
    matrix = reference.ggn(toy.problem, toy.params, toy.batch)
    matrix = matrix + LAM * reference.eye(len(matrix))
    expected = torch.linalg.solve(matrix, reference.ravel(evidence.grads))
    torch.testing.assert_close(reference.ravel(direction), expected, rtol=1e-8, atol=1e-10)


def test_with_small_damping_it_is_the_least_squares_solution_of_least_norm():
    a = normal((6, 4), 8) @ normal((4, 9), 9)
    b, theta = normal((6,), 10), normal((9,), 11)
    problem, batch = linear(a, b, theta)
    _, direction, _ = first(problem, batch, damping=1e-9, search="none")
    expected = torch.linalg.pinv(a, rtol=1e-10) @ (a @ theta - b)
    torch.testing.assert_close(direction["theta"], expected, rtol=1e-5, atol=1e-6)


def test_a_linear_equation_and_a_linear_model_are_solved_by_one_step():
    """Galerkin's method: four sines, whose Laplacians are multiples of themselves."""
    x = torch.cartesian_prod(*[(torch.arange(6, dtype=torch.float64) + 0.5) / 6] * 2)
    waves = torch.tensor([[1, 1], [1, 2], [2, 1], [2, 2]], dtype=torch.float64)
    sines = torch.sin(torch.pi * x.unsqueeze(1) * waves).prod(-1)
    laplacians = -(torch.pi**2) * waves.square().sum(1) * sines
    problem, batch = linear(laplacians, -2 * torch.pi**2 * sines[:, 0], normal((4,)))
    for search in ("none", "damping", "grid"):
        _, direction, _ = first(problem, batch, damping=1e-11, search=search)
        found = problem.params["theta"] - direction["theta"]
        torch.testing.assert_close(found, torch.eye(4, dtype=torch.float64)[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("n", [5, 2])
def test_weights_and_damping_have_one_scale(n):
    problem, batch = poisson(n=n)
    weighted = {k: (b.residual, 7 * b.weight) for k, b in problem.blocks.items()}
    scaled = fp.residuals(weighted, params=problem.params)
    _, direction, _ = first(problem, batch, damping=LAM, search="none")
    _, again, _ = first(scaled, batch, damping=7 * LAM, search="none")
    assert_close(again, direction, rtol=1e-7)


def test_the_grid_takes_the_best_of_its_lengths():
    problem, batch = poisson()
    params = problem.params
    _, step, _ = first(problem, batch, damping=1e-8, search="none")
    state, direction, evidence = first(problem, batch, damping=1e-8, search="grid")

    def loss(length):
        return poisson_residual(fp.apply(params, step, length), batch).square().sum() / 2

    lengths = [2.0**-i for i in range(31)]
    best = min(lengths, key=loss)
    assert loss(best) < evidence.loss
    assert_close(direction, treemath.mul(step, best), rtol=1e-9)
    assert float(state.damping) == 1e-8
    # Where no length lowers the loss, such as at the least squares themselves, nothing moves.
    at, other = linear(reference.eye(3), normal((3,)), normal((3,)))
    solved = {"theta": other["rows"][1]}
    _, direction, _ = first(at, other, params=solved, search="grid")
    assert not direction["theta"].any()


@pytest.mark.parametrize("search", ["grid", "damping", "none"])
def test_a_step_maps_over_dampings_and_has_their_derivatives(search):
    problem, batch = poisson(n=2, sizes=(2, 4, 1))
    params = problem.params

    def moved(damping):
        opt = fp.engd(damping=damping, search=search)
        evidence = fp.observe(problem, params, batch, opt.needs(0))
        _, direction = opt.update(opt.init(params), evidence.grads, evidence)
        return sum(d.sum() for d in direction.values())

    dampings = torch.tensor([0.1, 10.0], dtype=torch.float64)
    looped = torch.stack([moved(x) for x in dampings])
    torch.testing.assert_close(torch.vmap(moved)(dampings), looped)
    x, step = dampings[1], 1e-4
    slope = (moved(x + step) - moved(x - step)) / (2 * step)
    assert slope != 0
    torch.testing.assert_close(torch.func.grad(moved)(x), slope, rtol=1e-6, atol=0)


def test_the_damping_follows_whether_the_loss_falls():
    problem, batch = poisson()
    opt, params = fp.engd(damping=1e-6), problem.params
    state, seen = opt.init(params), set()
    for t in range(12):
        evidence = fp.observe(problem, params, batch, opt.needs(t))
        j, r = dense(params, batch)
        lam = float(state.damping)
        state, direction = opt.update(state, evidence.grads, evidence)
        expected = reference.unravel(push(j, r, lam), params)
        moved = poisson_residual(fp.apply(params, expected), batch).square().sum() / 2
        fell = bool(moved < evidence.loss)
        seen.add(fell)
        torch.testing.assert_close(float(state.damping), lam / 3 if fell else 4 * lam)
        if fell:
            assert_close(direction, expected, rtol=1e-5)
        else:
            assert not any(d.any() for d in direction.values())
        params = fp.apply(params, direction)
    assert seen == {True, False}


@pytest.mark.parametrize("n", [6, 2])
def test_a_damping_below_the_rounding_error_is_raised_to_it(n):
    problem, batch = poisson(n=n)
    _, direction, _ = first(problem, batch, damping=1e-30, search="none")
    assert finite(direction)
    j, r = dense(problem.params, batch)
    linear_after = (r - j @ reference.ravel(direction)).norm()
    assert linear_after < 1e-2 * r.norm() if n == 2 else linear_after < r.norm()


@pytest.mark.parametrize(
    ("opt", "bound"),
    [(fp.engd(damping=1e-8, search="grid"), 1e-5), (fp.engd(), 1e-4)],
    ids=["grid", "damping"],
)
def test_it_solves_poissons_equation_in_sixty_steps(opt, bound):
    problem, batch, error = poisson1d()
    step, params, state = fp.make_step(problem, opt), problem.params, opt.init(problem.params)
    for t in range(60):
        params, state, _ = step(params, state, batch, t)
    assert error(params) < bound


def test_it_refuses_an_unknown_search():
    with pytest.raises(ValueError, match="search must be 'damping', 'grid' or 'none'"):
        fp.engd(search="lm")
