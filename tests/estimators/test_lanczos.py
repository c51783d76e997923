import pytest
import torch

import funcprecond as fp
from funcprecond.estimators.lanczos import lanczos
from funcprecond.operators.algebra import Function, Matrix
from tests import reference, strategies
from tests.equality import assert_close
from tests.problems import normal, seeded


def operator(matrix):
    return Matrix(matrix, {"a": matrix.new_zeros(2, 2), "b": matrix.new_zeros(len(matrix) - 4)})


def spectrum(n=10, seed=0):
    values = torch.linspace(-1, 2, n, dtype=torch.float64) ** 3
    return values, strategies.with_spectrum(values, seed)


def test_the_basis_is_orthonormal_and_carries_the_matrix():
    _, m = spectrum()
    space = lanczos(operator(m), normal((10,), 1), 6)
    v, t = space.basis, space.tridiagonal()
    assert_close(v @ v.T, reference.eye(6), atol=1e-14)
    assert_close(v @ m @ v.T, t, atol=1e-13)
    rest = m @ v.T - v.T @ t
    assert_close(rest[:, :-1], torch.zeros(10, 5, dtype=torch.float64), atol=1e-13)
    assert_close(rest[:, -1], space.beta[-1] * space.following, atol=1e-13)


def test_moments_are_exact_up_to_twice_its_length_and_not_beyond():
    _, m = spectrum()
    start = normal((10,), 1)
    start = start / start.norm()
    values, vectors, _ = lanczos(operator(m), start, 4).ritz()
    weights = vectors[0] ** 2
    for power in range(8):
        moment = start @ torch.linalg.matrix_power(m, power) @ start
        assert_close((weights * values**power).sum(), moment, rtol=1e-11)
    moment = start @ torch.linalg.matrix_power(m, 8) @ start
    assert abs((weights * values**8).sum() - moment) > 1e-6


def test_all_steps_give_all_eigenvalues_and_bounds_hold_on_the_way():
    exact, m = spectrum()
    for steps in range(1, 11):
        values, _, bounds = lanczos(operator(m), normal((10,), 1), steps).ritz()
        nearest = (values.unsqueeze(1) - exact).abs().min(1).values
        assert (nearest <= bounds + 1e-12).all()
    assert_close(values, exact, rtol=1e-10)


def test_an_invariant_space_ends_it():
    values = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    m = strategies.with_spectrum(values, 0)
    assert len(lanczos(operator(m), normal((8,), 1), 8).alpha) == 3


def test_under_vmap_it_runs_to_the_end_with_zeros():
    a, b = spectrum(8)[1], torch.eye(8, dtype=torch.float64)
    start = normal((8,), 1)
    mapped = torch.vmap(lambda m: lanczos(operator(m), start, 4))(torch.stack([a, b]))
    assert_close(mapped.alpha[0], lanczos(operator(a), start, 4).alpha, atol=1e-12)
    zero = torch.zeros(3, dtype=torch.float64)
    assert_close(mapped.alpha[1], torch.cat([torch.ones(1, dtype=torch.float64), zero]), atol=1e-12)


def test_the_density_integrates_to_one_and_traces_are_right():
    values, m = spectrum(30)
    found = fp.spectral_density(operator(m), probes=20, steps=30, generator=seeded(0))
    grid = torch.linspace(-3, 10, 4001, dtype=torch.float64)
    density = found.density(grid, 0.05)
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-6)
    exact = torch.exp(-0.5 * ((grid.unsqueeze(1) - values) / 0.3) ** 2).mean(1)
    exact = exact / torch.trapezoid(exact, grid)
    error = torch.trapezoid((found.density(grid, 0.3) - exact).abs(), grid)
    assert error < 0.15
    trace, deviation = found.trace(lambda x: (1.5 + x).log())
    assert abs(trace - torch.logdet(m + 1.5 * reference.eye(30))) < 4 * deviation


def test_float32_gives_no_ghosts():
    values = torch.cat([torch.tensor([100.0, 10.0]), torch.linspace(0, 1, 58)])
    m = strategies.with_spectrum(values.double(), 0).float()
    space = lanczos(operator(m), normal((60,), 1, torch.float32), 40)
    ritz, _, _ = space.ritz()
    assert ((ritz > 5) & (ritz < 50)).sum() == 1
    assert (ritz > 50).sum() == 1
    assert_close(space.basis @ space.basis.T, torch.eye(len(space.alpha)), atol=1e-5)


def test_without_reorthogonalisation_copies_share_the_weight_and_none_is_kept():
    values = torch.cat([torch.tensor([100.0, 10.0]), torch.linspace(0, 1, 58)])
    m = strategies.with_spectrum(values.double(), 0).float()
    start = normal((60,), 1, torch.float32)
    space = lanczos(operator(m), start, 40, reorthogonalize=False)
    assert space.basis.shape == (0, 60)
    ritz, vectors, _ = space.ritz()
    copies = ritz > 50
    assert copies.sum() > 1
    whole = lanczos(operator(m), start, 40).ritz()
    assert_close(vectors[0, copies].square().sum(), whole[1][0, -1] ** 2, rtol=1e-4)
    found = [
        fp.spectral_density(
            operator(m), steps=40, vectors=start.unsqueeze(0), reorthogonalize=kept
        ).trace(torch.log1p)[0]
        for kept in (True, False)
    ]
    assert_close(found[1], found[0], rtol=1e-5)


def test_a_krylov_space_can_be_differentiated():
    m, start = spectrum(6)[1], normal((6,), 1)

    def moment(x):
        values, vectors, _ = lanczos(operator(x + x.T), start, 3).ritz()
        return (vectors[0] ** 2 * values**4).sum()

    def exact(x):
        v = start / start.norm()
        return v @ torch.linalg.matrix_power(x + x.T, 4) @ v

    assert_close(torch.func.grad(moment)(m), torch.func.grad(exact)(m), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_a_function_may_hold_what_requires_a_gradient(reorthogonalize):
    m = strategies.with_spectrum(torch.linspace(1, 2, 8, dtype=torch.float64), 0).requires_grad_()
    like = {"a": torch.zeros(8, dtype=torch.float64)}
    operator = Function(lambda v: {"a": m @ v["a"]}, like)
    start = normal((8,), 1)
    options = {"reorthogonalize": reorthogonalize}
    found = lanczos(operator, start, 3, **options).tridiagonal()
    with torch.no_grad():
        assert_close(found, lanczos(operator, start, 3, **options).tridiagonal(), rtol=1e-10)
