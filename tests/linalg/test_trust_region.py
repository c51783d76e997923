import pytest
import torch

from funcprecond.linalg.solution import Stop
from funcprecond.linalg.trust_region import truncated_cg
from tests import strategies
from tests.equality import assert_close
from tests.problems import normal


def run(matrix, b, **options):
    found = truncated_cg(lambda v: {"x": matrix @ v["x"]}, {"x": b}, **options)
    return found.solution["x"], found


def test_inside_of_a_large_region_it_is_the_solution():
    m = strategies.with_spectrum(torch.linspace(0.5, 3, 6, dtype=torch.float64), 0)
    b = normal((6,), 1)
    x, found = run(m, b, radius=1e3, tol=1e-12)
    assert_close(x, torch.linalg.solve(m, b), rtol=1e-9)
    assert int(found.reason) == Stop.RESIDUAL


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("radius", [0.01, 0.3, 2.0])
def test_it_stays_inside_and_is_never_above_the_cauchy_point(seed, radius):
    m, b = strategies.with_spectrum(normal((6,), seed), seed), normal((6,), seed + 50)
    x, found = run(m, b, radius=radius)
    model = lambda v: 0.5 * v @ m @ v - b @ v  # noqa: E731
    curvature = b @ m @ b
    step = radius / b.norm()
    if curvature > 0:
        step = min(step, b @ b / curvature)
    assert x.norm() <= radius * (1 + 1e-12)
    assert model(x) <= model(step * b) + 1e-12
    assert_close(found.residual["x"], b - m @ x, atol=1e-11)


def test_negative_curvature_leads_to_the_boundary():
    m = torch.diag(torch.tensor([2.0, -1.0], dtype=torch.float64))
    b = -torch.ones(2, dtype=torch.float64)
    x, found = run(m, b, radius=0.5)
    assert_close(x, -0.5 / 2**0.5 * torch.ones(2, dtype=torch.float64), rtol=1e-12)
    assert int(found.iterations) == 1
    x, found = run(m, b, radius=3.0)
    assert x.norm().item() == pytest.approx(3.0, rel=1e-12)
    assert int(found.reason) == Stop.BOUNDARY


def test_zero_and_nan():
    m = torch.eye(3, dtype=torch.float64)
    x, found = run(m, torch.zeros(3, dtype=torch.float64), radius=1.0)
    assert not x.any()
    assert int(found.reason) == Stop.RESIDUAL
    assert int(run(m * torch.nan, normal((3,)), radius=1.0)[1].reason) == Stop.NOT_FINITE


def test_the_radius_may_be_mapped():
    m, b = strategies.with_spectrum(normal((6,), 0), 0), normal((6,), 5)
    radii = torch.tensor([0.1, 1.0], dtype=torch.float64)
    mapped = torch.vmap(
        lambda r: truncated_cg(lambda v: {"x": m @ v["x"]}, {"x": b}, radius=r, max_iter=10)
    )(radii)
    for i, r in enumerate(radii):
        assert_close(mapped.solution["x"][i], run(m, b, radius=r)[0], rtol=1e-10)
