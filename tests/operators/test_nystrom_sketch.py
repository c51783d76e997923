import pytest
import torch

import funcprecond as fp
from funcprecond.linalg.solution import NotConverged, Stop
from funcprecond.operators.algebra import Matrix
from tests import problems, reference, strategies
from tests.equality import assert_close, assert_same
from tests.problems import normal, seeded


def operator(matrix):
    return Matrix(matrix, {"a": matrix.new_zeros(2, 2), "b": matrix.new_zeros(len(matrix) - 4)})


def test_a_matrix_of_its_rank_is_recovered():
    u = strategies.orthogonal(12, 0)[:, :4]
    m = u @ torch.diag(torch.tensor([5.0, 3.0, 1.0, 0.2], dtype=torch.float64)) @ u.T
    sketch = fp.nystrom(operator(m), 4, generator=seeded(0))
    assert_close(sketch.to_dense(), m, rtol=1e-11)
    assert_close(sketch.values, torch.tensor([5.0, 3.0, 1.0, 0.2], dtype=torch.float64), 1e-11)


def test_it_lies_between_zero_and_the_matrix():
    m = strategies.with_spectrum(0.7 ** torch.arange(16, dtype=torch.float64), 0)
    for rank in (1, 5, 16):
        sketch = fp.nystrom(operator(m), rank, generator=seeded(rank)).to_dense()
        assert torch.linalg.eigvalsh(m - sketch)[0] > -1e-10
        assert torch.linalg.eigvalsh(sketch)[0] > -1e-12
    assert_close(sketch, m, rtol=1e-9)


def test_an_indefinite_matrix_is_lifted():
    m = strategies.with_spectrum(torch.linspace(-0.3, 2, 8, dtype=torch.float64), 0)
    sketch = fp.nystrom(operator(m), 6, generator=seeded(0))
    assert torch.isfinite(sketch.to_dense()).all()
    assert (sketch.values >= 0).all()


def test_it_saves_iterations():
    noise = 1e-3 * torch.rand(14, generator=seeded(1), dtype=torch.float64)
    values = torch.cat([torch.logspace(-1, 1, 6, dtype=torch.float64), noise])
    m, b = strategies.with_spectrum(values, 0), normal((20,), 2)
    vector = reference.unravel(b, operator(m).like)
    options = {"damping": 1e-2, "tol": 1e-10}
    plain = operator(m).solve(vector, **options)
    quick = fp.nystrom_cg(operator(m), vector, rank=6, generator=seeded(0), **options)
    expected = torch.linalg.solve(m + 1e-2 * reference.eye(20), b)
    assert_close(reference.ravel(quick.solution), expected, rtol=1e-8)
    assert int(quick.iterations) < 0.7 * int(plain.iterations)
    exact = fp.nystrom(operator(m), 20, generator=seeded(0))
    again = fp.nystrom_cg(operator(m), vector, sketch=exact, **options)
    assert int(again.iterations) <= 2
    assert int(again.reason) == Stop.RESIDUAL


def test_on_a_network_and_never_silent():
    toy = problems.mlp()
    ggn, b = fp.GGN(toy.problem, toy.params, toy.batch), toy.params
    found = fp.nystrom_cg(ggn, b, damping=1e-3, rank=8, generator=seeded(0))
    dense = reference.ggn(toy.problem, toy.params, toy.batch) + 1e-3 * reference.eye(31)
    assert_close(
        reference.ravel(found.solution), torch.linalg.solve(dense, reference.ravel(b)), rtol=1e-3
    )
    assert_same(found, fp.nystrom_cg(ggn, b, damping=1e-3, rank=8, generator=seeded(0)))
    with pytest.raises(NotConverged):
        fp.nystrom_cg(ggn, b, damping=1e-6, rank=2, generator=seeded(0), max_iter=2)
    with pytest.raises(ValueError, match="rank must be"):
        fp.nystrom(ggn, 32, generator=seeded(0))
