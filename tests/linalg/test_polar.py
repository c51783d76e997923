"""MU-1, MU-2 and MU-5."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprecond.linalg.polar import polar, triples
from tests import strategies
from tests.equality import assert_close
from tests.problems import normal
from tests.strategies import orthogonal

POLYNOMIALS = ["jordan", "cubic", "quintic", "polar_express"]


def with_singular_values(s, m, n, seed=0):
    """(U, matrix, V^T) with these singular values."""
    r = min(m, n)
    u, vt = orthogonal(m, seed)[:, :r], orthogonal(n, seed + 1)[:r]
    return u, u @ s.diag() @ vt, vt


def scalar(polynomial, steps, s):
    """The same on the singular values alone, written out."""
    norm = s.square().sum().sqrt()
    x = s / (1.01 * norm + 1e-7) if polynomial == "polar_express" else s / norm.clamp_min(1e-7)
    for a, b, c in triples(polynomial, steps):
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.mark.parametrize("polynomial", POLYNOMIALS)
@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    steps=st.integers(0, 9),
    seed=strategies.seeds,
)
def test_the_matrix_iteration_is_the_scalar_one_on_the_singular_values(
    polynomial, shape, steps, seed
):
    s = normal((min(shape),), seed).abs() + 1e-3
    u, matrix, vt = with_singular_values(s, shape[0], shape[1], seed)
    expected = u @ scalar(polynomial, steps, s).diag() @ vt
    assert_close(polar(matrix, polynomial, steps), expected, rtol=1e-10)


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 6), (1, 5), (5, 1), (1, 1)])
def test_svd_gives_the_orthogonal_factor(shape):
    o = polar(normal(shape), "svd")
    small = o.T @ o if shape[0] >= shape[1] else o @ o.T
    assert_close(small, torch.eye(min(shape), dtype=torch.float64), rtol=1e-13)
    assert torch.linalg.eigvalsh(o.T @ normal(shape) @ o.T @ o).min() > -1e-12


def test_svd_leaves_null_directions_at_zero():
    s = torch.tensor([3.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    u, matrix, vt = with_singular_values(s, 5, 4)
    assert_close(polar(matrix, "svd"), u[:, :2] @ vt[:2], rtol=1e-12)


@pytest.mark.parametrize("polynomial", [*POLYNOMIALS, "svd"])
def test_zero_stays_zero_and_a_row_of_zeros_too(polynomial):
    assert not polar(torch.zeros(3, 4), polynomial).any()
    x = normal((3, 4))
    x[1] = 0
    o = polar(x, polynomial)
    assert not o[1].any()
    assert o[0].any()


@pytest.mark.parametrize(
    ("polynomial", "steps", "smallest", "low", "high"),
    [
        ("jordan", 5, 1e-2, 0.68, 1.14),
        ("jordan", 5, 1e-3, 0.47, 1.21),
        ("polar_express", 5, 1e-3, 0.84, 1.13),
        ("polar_express", 6, 1e-3, 0.992, 1.002),
        ("polar_express", 8, 1e-3, 1 - 1e-12, 1 + 1e-12),
        ("quintic", 20, 1e-3, 1 - 1e-12, 1 + 1e-12),
        ("cubic", 30, 1e-3, 1 - 1e-12, 1 + 1e-12),
    ],
)
def test_the_measured_bands_of_singular_values(polynomial, steps, smallest, low, high):
    s = torch.logspace(0, torch.log10(torch.tensor(smallest)).item(), 2000, dtype=torch.float64)
    x = s / 1.01 if polynomial == "polar_express" else s
    for a, b, c in triples(polynomial, steps):
        x = a * x + b * x**3 + c * x**5
    assert low < x.min()
    assert x.max() < high


@pytest.mark.parametrize(
    ("shape", "condition", "steps"),
    [((64, 64), 1e2, 8), ((128, 32), 1e2, 8), ((256, 256), 1e2, 8), ((256, 256), 1e3, 10)],
)
def test_polar_express_in_float32_is_orthogonal_to_1e_5(shape, condition, steps):
    n = min(shape)
    s = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=torch.float64)
    _, matrix, _ = with_singular_values(s, shape[0], shape[1])
    o = polar(matrix.float(), "polar_express", steps)
    assert (o.T @ o - torch.eye(n)).abs().max() < 1e-5


@pytest.mark.parametrize("polynomial", [*POLYNOMIALS, "svd"])
@pytest.mark.parametrize("leading", [(3,), (2, 2)])
def test_a_stack_is_its_matrices(polynomial, leading):
    stack = normal((*leading, 4, 3))
    result = polar(stack, polynomial).reshape(-1, 4, 3)
    for one, x in zip(result, stack.reshape(-1, 4, 3), strict=True):
        assert_close(one, polar(x, polynomial), rtol=1e-11)


def test_an_unknown_polynomial_is_named():
    with pytest.raises(ValueError, match="quartic"):
        polar(torch.ones(2, 2), "quartic")  # pyright: ignore[reportArgumentType]
