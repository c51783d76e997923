"""M-FAC against dense inverses and both of the paper's algorithms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcprecond as fp
from tests import reference
from tests.equality import assert_close, assert_same
from tests.problems import normal

SHAPES = {"w": (2, 3), "b": (), "k": (2, 1, 2)}


def gradient(seed):
    return {k: normal(s, 10 * seed + i) for i, (k, s) in enumerate(SHAPES.items())}


def run(opt, steps):
    state, direction = opt.init(gradient(0)), None
    for t in range(steps):
        state, direction = opt.update(state, gradient(t))
    return state, reference.ravel(direction)


def last(steps, m):
    return torch.stack([reference.ravel(gradient(t)) for t in range(max(0, steps - m), steps)])


@given(st.integers(1, 7), st.integers(1, 12), st.sampled_from([1e-2, 0.3, 5.0]))
def test_the_direction_is_the_dense_solve_with_the_last_gradients(m, steps, lam):
    """Also while the window is not full: the divisor is m all the same."""
    _, found = run(fp.mfac(window=m, damping=lam), steps)
    rows = last(steps, m)
    matrix = lam * reference.eye(rows.shape[1]) + rows.T @ rows / m
    torch.testing.assert_close(found, torch.linalg.solve(matrix, rows[-1]), rtol=1e-9, atol=1e-11)


def test_the_static_algorithm_of_the_paper_gives_the_same_product():
    m, lam = 5, 0.2
    rows = last(8, m)
    x, v, divisors = rows[-1], [], []
    for g in rows:
        own = g / lam - sum(w * (w @ g) / d for w, d in zip(v, divisors, strict=True))
        v, divisors = [*v, own], [*divisors, m + g @ own]
    expected = x / lam - sum(w * (w @ x) / d for w, d in zip(v, divisors, strict=True))
    torch.testing.assert_close(run(fp.mfac(window=m, damping=lam), 8)[1], expected)


def test_the_dynamic_algorithm_of_the_paper_gives_the_same_product():
    m, lam = 5, 0.2
    state, found = run(fp.mfac(window=m, damping=lam), 8)
    # In the order of the ring, which has no influence.
    rows, x = state.window.stacked, last(8, m)[-1]
    d = rows @ rows.T / lam
    for i in range(m):
        d[i + 1 :, i + 1 :] -= torch.outer(d[i, i + 1 :], d[i, i + 1 :]) / (m + d[i, i])
    d, b, c = d.triu(), reference.eye(m) / lam, rows @ x / lam
    for i in range(m):
        b[i, :i] = -(d[:i, i] / (m + d.diagonal()[:i])) @ b[:i, :i]
        c[i + 1 :] = c[i + 1 :] - d[i, i + 1 :] * c[i] / (m + d[i, i])
    expected = x / lam - ((c / (m + d.diagonal())) @ b) @ rows
    torch.testing.assert_close(found, expected)


def test_a_window_of_one_has_a_closed_form():
    g = reference.ravel(gradient(2))
    torch.testing.assert_close(run(fp.mfac(window=1, damping=0.1), 3)[1], g / (0.1 + g @ g))


def test_the_window_is_one_tensor_with_its_inner_products():
    state, _ = run(fp.mfac(window=4, damping=0.1), 7)
    rows = state.window.stacked
    assert rows.shape == (4, 11)
    torch.testing.assert_close(state.window.dots, rows @ rows.T)
    assert_same(rows[6 % 4], reference.ravel(gradient(6)))


def test_a_small_damping_loses_no_digits_in_float32():
    """The textbook form, (g - Uᵀ(...)U g) / λ, loses all of them here."""
    lam, opt = 1e-5, fp.mfac(window=8, damping=1e-5)
    state = opt.init({"x": torch.zeros(200)})
    rows = normal((5, 200), 3)
    direction = None
    for g in rows:
        state, direction = opt.update(state, {"x": g.float()})
    rows = rows.float().double()
    matrix = lam * reference.eye(200) + rows.T @ rows / 8
    expected = torch.linalg.solve(matrix, rows[-1])
    assert direction is not None
    assert_close(direction["x"].double(), expected, rtol=2e-3)


def test_it_says_what_is_wrong():
    for options, match in (({"window": 0}, "window"), ({"damping": 0.0}, "positive")):
        with pytest.raises(ValueError, match=match):
            fp.mfac(**options)
