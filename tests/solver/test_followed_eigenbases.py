"""Bases that follow a statistic: when they change, and that they are its eigenvectors."""

import pytest
import torch

import funcprecond as fp
from funcprecond.solver.followed_eigenbases import FollowedEigenbases
from tests.equality import assert_close, assert_same
from tests.problems import normal

PARAMS = {"w": normal((4, 3), 1), "b": normal((3,), 2), "row": normal((1, 5), 3)}


def statistics(seed):
    found = {}
    for name, p in PARAMS.items():
        roots = [normal((n, n), seed + n) for n in p.shape] if name == "w" else []
        found[name] = tuple(r @ r.T for r in roots)
    return found


def marks(basis, t):
    """The evidence of step t, with the marks that are due and nothing measured."""
    due = dict.fromkeys(basis.needs(t), ())
    return fp.Evidence(PARAMS, torch.zeros(()), None, PARAMS, {}, due)


def off_diagonal(bases, matrices):
    rotated = [q.T @ s @ q for q, s in zip(bases, matrices, strict=True)]
    return max(float((r - r.diagonal().diag()).norm() / r.norm()) for r in rotated)


def test_vectors_and_long_axes_have_no_basis():
    assert [len(x) for x in FollowedEigenbases().identities(PARAMS).values()] == [2, 0, 0]
    assert [len(x) for x in FollowedEigenbases(max_dim=3).identities(PARAMS).values()] == [1, 0, 0]


def test_first_they_are_decomposed_then_followed_at_the_interval():
    basis, s = FollowedEigenbases(refresh_every=3), statistics(10)
    bases, ways = basis.identities(PARAMS), []
    for t in range(7):
        bases, how = basis.refreshed(s, bases, marks(basis, t))
        ways.append(how)
    assert ways == ["decomposed", "kept", "kept", "followed", "kept", "kept", "followed"]
    assert off_diagonal(bases["w"], s["w"]) < 1e-9


def test_with_eigh_every_refresh_is_a_decomposition():
    basis = FollowedEigenbases(refresh_every=2, refresh="eigh")
    ways = [
        basis.refreshed(statistics(1), basis.identities(PARAMS), marks(basis, t))[1]
        for t in range(4)
    ]
    assert ways == ["decomposed", "kept", "decomposed", "kept"]


def test_following_converges_to_the_eigenvectors():
    basis, s = FollowedEigenbases(refresh_every=1, epsilon=0.0), statistics(20)
    bases = basis.identities(PARAMS)
    start = off_diagonal(bases["w"], s["w"])
    for _ in range(60):
        bases, _ = basis.refreshed(s, bases, marks(basis, 1))
    assert off_diagonal(bases["w"], s["w"]) < 1e-3 * start
    for q in bases["w"]:
        assert_close(q.T @ q, torch.eye(len(q), dtype=q.dtype), rtol=1e-12, atol=1e-12)


def test_statistics_are_averages_of_gram_matrices():
    basis = FollowedEigenbases(every=2)
    zero = tuple(torch.zeros(n, n, dtype=torch.float64) for n in (4, 3))
    g = normal((4, 3), 5)
    found = basis.statistics(zero, g, 0.9, marks(basis, 0))
    assert_close(found, (0.1 * g @ g.T, 0.1 * g.T @ g), rtol=1e-12)
    assert_same(basis.statistics(zero, g, 0.9, marks(basis, 1)), zero)


@pytest.mark.parametrize("options", [{"refresh": "svd"}, {"max_dim": -1}, {"refresh_every": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options)).split("_")[0]):
        FollowedEigenbases(**options)
