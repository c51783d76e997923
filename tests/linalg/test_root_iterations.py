"""Roots by products alone, held to eigendecompositions in float64."""

import pytest
import torch

import funcprecond as fp
from funcprecond.linalg.inverse_roots import inverse_root
from funcprecond.linalg.root_iterations import coupled_newton, norm_bound, polar_express
from tests import reference
from tests.problems import normal
from tests.strategies import with_spectrum

SPECTRA = {
    "mild": lambda n: torch.logspace(0, -2, n, dtype=torch.float64),
    "power": lambda n: torch.arange(1, n + 1, dtype=torch.float64) ** -2,
    "six decades": lambda n: torch.logspace(0, -6, n, dtype=torch.float64),
    "low rank": lambda n: (torch.arange(n) < max(n // 8, 1)).to(torch.float64),
}
# Three times the errors measured at n = 256 in float32 with a ridge of 1e-6.
BOUNDS = {"mild": 1e-5, "power": 1e-3, "six decades": 8e-3, "low rank": 3e-2}
METHODS = ["polar_express", "coupled_newton"]


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("n", [1, 2, 16, 65])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_roots_in_float32_are_within_the_measured_errors(method, p, spectrum, n):
    matrix = with_spectrum(SPECTRA[spectrum](n), 0).float()
    found, ok = inverse_root(matrix, p, epsilon=1e-6, method=method)
    bound = float(norm_bound(matrix.double())[0, 0])
    exact = reference.power(matrix.double() + 1e-6 * bound * reference.eye(n), -1 / p)
    assert bool(ok)
    assert relative(found, exact) < BOUNDS[spectrum]


@pytest.mark.parametrize("p", [1, 3, 6])
def test_coupled_newton_takes_any_integer_root(p):
    matrix = with_spectrum(torch.logspace(0, -3, 9, dtype=torch.float64), 1)
    found, error = coupled_newton(matrix, p)
    assert error < 1e-12
    assert relative(found, reference.power(matrix, -1 / p)) < 1e-10


def test_a_fourth_root_is_not_a_square_root():
    matrix = with_spectrum(torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64), 2)
    for root, _ in (polar_express(matrix, 4), coupled_newton(matrix, 4)):
        fourth = torch.linalg.matrix_power(root, 4) @ matrix
        torch.testing.assert_close(fourth, reference.eye(3), rtol=1e-4, atol=1e-4)
        assert (root @ root @ matrix - reference.eye(3)).abs().max() > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_a_stack_is_its_matrices_and_a_bad_one_leaves_the_others(method):
    good = [with_spectrum(torch.logspace(0, -3, 5, dtype=torch.float64), i) for i in range(2)]
    bad = torch.full((5, 5), float("nan"), dtype=torch.float64)
    found, ok = inverse_root(torch.stack([good[0], bad, good[1]]), 4, epsilon=1e-6, method=method)
    assert ok.tolist() == [True, False, True]
    for i, matrix in ((0, good[0]), (2, good[1])):
        alone, _ = inverse_root(matrix, 4, epsilon=1e-6, method=method)
        torch.testing.assert_close(found[i], alone)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1e12, 1e20])
def test_scaling_the_matrix_scales_the_root(method, scale):
    matrix = with_spectrum(torch.logspace(0, -2, 6, dtype=torch.float64), 3).float()
    one, _ = inverse_root(matrix, 4, epsilon=1e-6, method=method)
    found, ok = inverse_root(scale * matrix, 4, epsilon=1e-6, method=method)
    assert bool(ok)
    torch.testing.assert_close(found * scale**0.25, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_an_indefinite_matrix_is_reported_not_returned_as_a_root(method):
    matrix = torch.diag(torch.tensor([1.0, -0.9, 0.5], dtype=torch.float64))
    _, ok = inverse_root(matrix, 4, epsilon=1e-6, method=method)
    assert not bool(ok)


@pytest.mark.parametrize("n", [1, 3, 40])
def test_the_norm_bound_is_a_bound_and_close(n):
    matrix = with_spectrum(torch.logspace(0, -1, n, dtype=torch.float64), 4)
    assert 1 <= float(norm_bound(matrix)) <= n ** (1 / 16) + 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_shampoo_with_products_is_shampoo(method):
    g = {"w": normal((6, 6))}
    exact, found = (
        opt.update(opt.init(g), g)[1]["w"] for opt in (fp.shampoo(), fp.shampoo(method=method))
    )
    assert relative(found, exact) < 1e-2


@pytest.mark.parametrize(
    ("method", "p"), [("polar_express", 6), ("coupled_newton", 2.5), ("schur", 2)]
)
def test_roots_that_a_method_cannot_take_are_refused(method, p):
    with pytest.raises(ValueError, match=r"eigh"):
        inverse_root(reference.eye(3), p, epsilon=1e-6, method=method)
