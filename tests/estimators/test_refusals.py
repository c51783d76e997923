"""What estimators refuse, and what they return at the edges: one eigenvalue, NaN, derivatives."""

import pytest
import torch

import funcprecond as fp
from funcprecond.operators.algebra import Identity, Matrix
from tests import reference, strategies
from tests.equality import assert_close
from tests.problems import normal, seeded

LIKE = {"w": torch.zeros(6, dtype=torch.float64)}
NEED_SYMMETRY = {
    "eigsh()": lambda a: fp.eigsh(a, generator=seeded(0)),
    "spectral_density()": lambda a: fp.spectral_density(a, generator=seeded(0)),
    "xdiag()": lambda a: fp.xdiag(a, 4, generator=seeded(0)),
    "nystrom()": lambda a: fp.nystrom(a, 2, generator=seeded(0)),
    "solve()": lambda a: a.solve(LIKE),
}


@pytest.mark.parametrize("name", list(NEED_SYMMETRY))
def test_a_product_of_operators_is_refused_where_symmetry_is_needed(name):
    a, b = (Matrix(strategies.with_spectrum(normal((6,), i), i), LIKE) for i in (0, 1))
    for product in (a @ b, 2.0 * (a @ b), a + a @ b, (a @ b) + 0.1):
        with pytest.raises(TypeError, match=rf"{name[:-2]}\(\) needs a symmetric operator"):
            NEED_SYMMETRY[name](product)


def test_estimates_of_traces_accept_any_operator():
    a, b = (strategies.with_spectrum(normal((12,), i), i) for i in (0, 1))
    like = {"w": a[0]}
    product = Matrix(a, like) @ Matrix(b, like)
    for estimator in (fp.hutchinson_trace, fp.hutchpp, fp.xtrace):
        found = torch.stack(
            [estimator(product, 6, generator=seeded(i)).estimate for i in range(400)]
        )
        assert abs(found.mean() - (a @ b).trace()) < 4 * found.std() / 20


@pytest.mark.parametrize("value", [2.0, -3e-8, 0.0, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("points", [4000, 4001])
def test_the_density_of_one_eigenvalue_integrates_to_one(value, dtype, points):
    a = Identity({"w": torch.zeros(7, dtype=dtype)}, value)
    density = fp.spectral_density(a, probes=3, generator=seeded(0))
    reach = abs(value) or 1.0
    grid = torch.linspace(value - reach, value + reach, points, dtype=torch.float64)
    assert torch.trapezoid(density.density(grid), grid).item() == pytest.approx(1, rel=1e-3)
    with pytest.raises(ValueError, match="width must be positive"):
        density.density(grid, 0.0)


def test_products_that_are_not_finite_are_named():
    a = Matrix(torch.full((6, 6), torch.nan, dtype=torch.float64), LIKE)
    for estimate in (NEED_SYMMETRY["eigsh()"], NEED_SYMMETRY["spectral_density()"]):
        with pytest.raises(ValueError, match="NaN or infinite entries"):
            estimate(a)


def test_eigenvalues_have_derivatives_in_data_that_require_gradients():
    """Against finite differences of the eigenvalues of the dense matrix."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 2))
    problem = fp.problem(model.double(), fp.losses.cross_entropy)
    x, y = normal((5, 3), 1).requires_grad_(), torch.tensor([0, 1, 1, 0, 1])

    def largest(inputs):
        return torch.linalg.eigvalsh(reference.ggn(problem, problem.params, (inputs, y)))[-2:]

    found = fp.eigsh(fp.GGN(problem, problem.params, (x, y)), 2, generator=seeded(0), tol=1e-10)
    assert_close(found.values.detach(), largest(x.detach()).flip(0), rtol=1e-8)
    direction = normal((5, 3), 2)
    for i in range(2):
        (gradient,) = torch.autograd.grad(found.values[i], x, retain_graph=True)
        ahead, behind = (largest(x.detach() + h * direction)[1 - i] for h in (1e-5, -1e-5))
        assert_close((gradient * direction).sum(), (ahead - behind) / 2e-5, rtol=1e-5)
    assert not any(v.requires_grad for v in found.vectors.values())
    density = fp.spectral_density(
        fp.GGN(problem, problem.params, (x, y)), probes=2, generator=seeded(0)
    )
    assert not density.nodes.requires_grad
