import torch

import funcprecond as fp
from funcprecond.operators.low_rank import LowRank
from tests import reference, strategies
from tests.equality import assert_close, assert_same
from tests.problems import normal

LIKE = {"a": torch.zeros(2, 3, dtype=torch.float64), "b": torch.zeros(4, dtype=torch.float64)}


def low_rank(values=(3.0, -1.0, 0.5)):
    u = strategies.orthogonal(10, 0)[:, : len(values)].T
    a, b = u.split([6, 4], 1)
    theta = torch.tensor(values, dtype=torch.float64)
    vectors = {"a": a.reshape(-1, 2, 3), "b": b}
    return LowRank(theta, vectors, torch.zeros_like(theta)), u.T @ torch.diag(theta) @ u


def test_it_is_its_dense_matrix():
    c, dense = low_rank()
    v = normal((10,), 1)
    vector = reference.unravel(v, LIKE)
    assert_close(c.to_dense(), dense, rtol=1e-12)
    assert_close(reference.ravel(c @ vector), dense @ v, rtol=1e-12)
    assert_close(reference.ravel(c.diagonal()), dense.diagonal(), rtol=1e-12)
    assert_close(c.trace(), dense.trace(), rtol=1e-12)
    assert_close(c.frobenius_norm(), dense.norm(), rtol=1e-12)
    assert_close((c + 2.0).to_dense(), dense + 2 * reference.eye(10), rtol=1e-12)


def test_inverse_power_and_logdet_are_those_of_the_damped_matrix():
    c, dense = low_rank()
    damped = dense + 1.5 * reference.eye(10)
    assert_close(c.inverse(1.5).to_dense(), torch.linalg.inv(damped), rtol=1e-11)
    assert_close(c.power(-0.5, 1.5).to_dense(), reference.power(damped, -0.5), rtol=1e-11)
    assert_close(c.logdet(1.5), torch.logdet(damped), rtol=1e-12)
    assert_close(c.logdet(torch.tensor(1.5)), torch.logdet(damped), rtol=1e-12)


def test_the_preconditioner_is_nystroms():
    c, _ = low_rank((3.0, 1.0, 0.5))
    u = strategies.orthogonal(10, 0)[:, :3]
    inner = torch.diag(1 / (c.values + 0.1))
    expected = 0.6 * u @ inner @ u.T + reference.eye(10) - u @ u.T
    assert_close(c.preconditioner(0.1).to_dense(), expected, rtol=1e-11)


def test_it_is_saved_and_loaded_and_mapped(tmp_path):
    c, _ = low_rank()
    fp.save(tmp_path / "c.pt", c)
    assert_same(fp.load(tmp_path / "c.pt", c), c)
    v = reference.unravel(normal((10,), 1), LIKE)
    stacked = fp.tree.map(lambda x: torch.stack([x, 2 * x]), c)
    mapped = torch.vmap(lambda c: c @ v)(stacked)
    assert_close({k: x[0] for k, x in mapped.items()}, c @ v, rtol=1e-12)
