"""TONGA against the dense recursion of its matrix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcprecond as fp
from tests import reference
from tests.methods.test_mfac import gradient


def marked(opt, t):
    """Evidence of the marks alone, as a loop gives it."""
    problem = fp.problem(lambda p, x: x * p["b"], fp.losses.mse, params=gradient(0))
    return fp.observe(problem, gradient(0), (torch.ones(1), torch.ones(1)), opt.needs(t))


def run(opt, steps):
    state, direction = opt.init(gradient(0)), None
    for t in range(steps):
        state, direction = opt.update(state, gradient(t), marked(opt, t))
    return state, reference.ravel(direction)


def dense(steps, lam, decay, rank, every):
    """``(C + λ I)⁻¹ g`` with the dense recursion, and C itself."""
    c, g = torch.zeros(11, 11, dtype=torch.float64), torch.zeros(11, dtype=torch.float64)
    for t in range(steps):
        if t % every == 0:
            values, vectors = torch.linalg.eigh(c)
            c = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
        g = reference.ravel(gradient(t))
        c = decay * c + torch.outer(g, g)
    return torch.linalg.solve(c + lam * reference.eye(11), g), c


@given(
    st.integers(1, 11),
    st.sampled_from([0.5, 0.9, 0.995]),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from([0.05, 2.0]),
)
def test_every_step_is_the_dense_recursion(steps, decay, rank, every, lam):
    options = {"damping": lam, "decay": decay, "rank": rank, "every": every}
    state, found = run(fp.tonga(**options), steps)
    expected, c = dense(steps, lam, decay, rank, every)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    rows = state.window.weights.sqrt().unsqueeze(1) * state.window.stacked
    torch.testing.assert_close(rows.T @ rows, c, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(state.window.gram(), rows @ rows.T, rtol=1e-7, atol=1e-9)


def test_the_rows_after_a_truncation_are_discounted_by_their_age():
    """Three steps later: √γ³ V_kᵀ X, and the gradients times √γ² and √γ and 1."""
    state, _ = run(fp.tonga(damping=0.1, decay=0.9, rank=2, every=4), 7)
    expected = torch.tensor([0.9**3, 0.9**3, 0.9**2, 0.9, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(state.window.weights, expected)
    torch.testing.assert_close(state.window.stacked[3], reference.ravel(gradient(5)))


def test_without_evidence_each_update_truncates():
    opt = fp.tonga(damping=0.1, decay=0.9, rank=2, every=4)
    state, direction = opt.init(gradient(0)), None
    for t in range(5):
        state, direction = opt.update(state, gradient(t))
    torch.testing.assert_close(reference.ravel(direction), dense(5, 0.1, 0.9, 2, 1)[0])


def test_it_says_what_is_wrong():
    for options, match in (
        ({"damping": 0.0}, "positive"),
        ({"decay": 1.5}, "decay"),
        ({"rank": 0}, "rank"),
        ({"every": 0}, "every"),
    ):
        with pytest.raises(ValueError, match=match):
            fp.tonga(**options)
