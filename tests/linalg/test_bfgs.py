"""The two-loop recursion against dense BFGS."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprecond.linalg.bfgs import History, bfgs_update, powell, two_loop
from tests.equality import assert_same
from tests.problems import normal
from tests.reference import eye
from tests.strategies import seeds, with_spectrum


def hessian(n, seed=0):
    return with_spectrum(torch.logspace(-1, 1, n, dtype=torch.float64), seed)


def pairs(n, m, seed=0):
    steps = normal((m, n), seed + 1)
    return steps, steps @ hessian(n, seed)


def filled(n, m, size=None, seed=0):
    history = History.init(size or m, torch.zeros(n, dtype=torch.float64))
    for s, y in zip(*pairs(n, m, seed), strict=True):
        history = history.push(s, y)
    return history


def dense(history):
    h = history.gamma * eye(history.steps.shape[1])
    for s, y, rho in zip(history.steps, history.changes, history.rho, strict=True):
        h = bfgs_update(h, s, y) if rho else h
    return h


def test_the_dense_update_is_the_textbook_formula(randn):
    s, y = randn(4), randn(4)
    h = hessian(4)
    rho = 1 / (s @ y)
    outer = eye(4) - rho * torch.outer(s, y)
    expected = outer @ h @ outer.T + rho * torch.outer(s, s)
    torch.testing.assert_close(bfgs_update(h, s, y), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(bfgs_update(h, s, y) @ y, s)


@given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 3), seeds)
def test_two_loop_is_the_product_of_dense_updates(n, m, empty, seed):
    history = filled(n, m, m + empty, seed)
    vector = normal((n,), seed + 2)
    expected = dense(history) @ vector
    assert (history.apply(vector) - expected).norm() <= 1e-10 * max(expected.norm(), 1)


def test_the_newest_pair_satisfies_the_secant_equation():
    history = filled(7, 4)
    torch.testing.assert_close(
        history.apply(history.changes[-1]), history.steps[-1], rtol=1e-12, atol=1e-13
    )


def test_gamma_is_that_of_the_newest_pair():
    history = filled(6, 3)
    s, y = history.steps[-1], history.changes[-1]
    torch.testing.assert_close(history.gamma, s @ y / (y @ y))


def test_exact_line_searches_end_at_the_minimum_with_the_inverse_hessian():
    n = 7
    h, centre, x = hessian(n), normal((n,), 1), normal((n,), 2)
    history = History.init(n, x)
    one = torch.ones((), dtype=torch.float64)
    cg_x, r = x, h @ (centre - x)
    p = r
    for _ in range(n):
        g = h @ (x - centre)
        d = -two_loop(history.steps, history.changes, history.rho, one, g)
        new = x - (g @ d) / (d @ h @ d) * d
        history = history.push(new - x, h @ (new - x))
        x = new
        # Conjugate gradients, whose iterates these are.
        alpha = (r @ r) / (p @ h @ p)
        cg_x, before = cg_x + alpha * p, r
        r = r - alpha * (h @ p)
        p = r + (r @ r) / (before @ before) * p
        assert (x - cg_x).norm() < 1e-9
    assert (h @ (x - centre)).norm() < 1e-11
    found = torch.stack(
        [two_loop(history.steps, history.changes, history.rho, one, e) for e in eye(n)]
    )
    torch.testing.assert_close(found, torch.linalg.inv(h), rtol=1e-9, atol=1e-10)


def test_the_oldest_pair_leaves():
    s, y = pairs(5, 4)
    history = filled(5, 4, 3)
    assert torch.equal(history.steps, s[1:])
    assert torch.equal(history.changes, y[1:])
    assert int(history.filled()) == 3


@pytest.mark.parametrize("case", ["zero", "negative", "flat", "nan", "inf"])
def test_a_pair_that_is_not_fit_changes_nothing(case):
    history = filled(5, 2, 3)
    s = normal((5,), 8)
    y = {
        "zero": 0 * s,
        "negative": -s,
        "flat": 0.9e-4 * s,
        "nan": s * torch.nan,
        "inf": s * torch.inf,
    }[case]
    assert_same(history.push(s, y), history)
    assert_same(history.push(0 * s, 0 * s), history)


def test_the_least_curvature_does_not_depend_on_the_length_of_the_step():
    history = filled(5, 1, 3)
    for length in (1e-9, 1.0, 1e9):
        s = length * normal((5,), 8)
        assert int(history.push(s, 1.1e-4 * s).filled()) == 2
        assert int(history.push(s, 0.9e-4 * s).filled()) == 1


@given(st.integers(2, 6), seeds)
def test_powells_pair_has_exactly_the_threshold_where_it_acts(n, seed):
    b, s = hessian(n, seed), normal((n,), seed + 1)
    y = normal((n,), seed + 2)
    y = y if s @ y < 0 else -y
    bs = b @ s
    torch.testing.assert_close(s @ powell(s, y, bs), 0.2 * (s @ bs), rtol=1e-10, atol=1e-12)
    assert torch.equal(powell(s, bs, bs), bs)


def test_rho_is_float64_for_float32_vectors():
    s, y = (x.float() for x in pairs(5, 1))
    history = History.init(2, torch.zeros(5)).push(s[0], y[0])
    assert history.rho.dtype == torch.float64
    assert history.steps.dtype == torch.float32
    expected = 1 / (s[0].double() @ y[0].double())
    torch.testing.assert_close(history.rho[-1], expected, rtol=1e-15, atol=0)


def test_vmap_takes_and_leaves_pairs_on_their_own():
    histories = [filled(5, 2, 3, seed) for seed in range(3)]
    s, y = normal((3, 5), 5), normal((3, 5), 6)
    stacked = torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *histories)
    together = torch.vmap(lambda h, s, y: h.push(s, y))(stacked, s, y)
    for j, history in enumerate(histories):
        alone = history.push(s[j], y[j])
        torch.testing.assert_close(together.steps[j], alone.steps)
        torch.testing.assert_close(together.rho[j], alone.rho)
