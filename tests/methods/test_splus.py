"""SP-1 to SP-4."""

import pytest
import torch
from hypothesis import given

import funcprecond as fp
from tests import reference, strategies
from tests.equality import assert_close
from tests.methods.test_adagrad import last
from tests.methods.test_soap import directions, due
from tests.problems import normal
from tests.strategies import orthogonal


def loop(grads, b1=0.9, b2=0.999, frequency=1):
    """The algorithm for a matrix as a plain loop."""
    m_dim, n_dim = grads[0].shape
    q_l, q_r = reference.eye(m_dim), reference.eye(n_dim)
    m, left, right = torch.zeros_like(grads[0]), 0 * q_l, 0 * q_r
    found = []
    for t, g in enumerate(grads):
        m = b1 * m + (1 - b1) * g
        found.append(2 / (m_dim + n_dim) * q_l @ torch.sign(q_l.T @ m @ q_r) @ q_r.T)
        left, right = b2 * left + (1 - b2) * g @ g.T, b2 * right + (1 - b2) * g.T @ g
        if t % frequency == 0:
            q_l, q_r = torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1]
    return found


def averaged(grads, b1=0.9):
    n = len(grads)
    return torch.stack([(1 - b1) * b1 ** (n - 1 - i) * g for i, g in enumerate(grads)]).sum(0)


@pytest.mark.parametrize("frequency", [1, 4])
@pytest.mark.parametrize("shape", [(4, 4), (3, 4)])
def test_splus_is_the_plain_loop_step_by_step(shape, frequency):
    grads = [normal(shape, i) for i in range(9)]
    ours = directions(fp.splus(refresh_every=frequency), grads)
    for x, y in zip(ours, loop(grads, frequency=frequency), strict=True):
        assert_close(x, y, rtol=1e-8)


@given(strategies.gradients(max_axes=3))
def test_the_length_depends_on_the_shape_only(grads):
    """SP-1; for a matrix 2 sqrt(m n) / (m + n)."""
    shape = grads[0].shape
    expected = len(shape) * grads[0].numel() ** 0.5 / sum(shape)
    assert last(fp.splus(), grads).norm().item() == pytest.approx(expected, rel=1e-9)


@given(strategies.gradients(max_axes=2))
def test_the_scale_of_the_gradient_never_enters(grads):
    """SP-2: a power of two changes no rounding, so not a single sign."""
    for c in (2.0**-40, 2.0**40):
        scaled = last(fp.splus(), [c * g for g in grads])
        assert_close(scaled, last(fp.splus(), grads), rtol=1e-12)


def test_the_first_step_is_sign_descent():
    g = normal((4, 3))
    assert_close(last(fp.splus(), [g]), 2 / 7 * g.sign(), rtol=1e-14)


def test_without_bases_it_is_sign_descent_of_the_momentum():
    grads = [normal((4, 3), i) for i in range(5)]
    mean = averaged(grads)
    assert_close(last(fp.splus(max_dim=2), grads), 2 / 7 * torch.sign(mean), rtol=1e-14)


def test_in_the_exact_bases_the_direction_is_the_signed_polar_factor():
    """SP-3."""
    u, v = orthogonal(4, 0), orthogonal(4, 1)
    s = torch.tensor([4.0, -3.0, 2.0, -1.0], dtype=torch.float64)
    grads = [c * u @ s.diag() @ v.T for c in (1.0, 2.0)]
    expected = 2 / 8 * u @ s.sign().diag() @ v.T
    assert_close(last(fp.splus(), grads), expected, rtol=1e-10)


@given(strategies.seeds)
def test_splus_commutes_with_rotations_once_it_has_bases(seed):
    """SP-4."""
    grads = [normal((4, 4), seed + i) for i in range(6)]
    a, b = orthogonal(4, seed), orthogonal(4, seed + 1)
    x, y = (
        directions(fp.splus(refresh_every=2), path) for path in (grads, [a @ g @ b for g in grads])
    )
    for ours, rotated in list(zip(x, y, strict=True))[1:]:
        assert_close(rotated, a @ ours @ b, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (5,), (5, 1), (1, 1)])
def test_a_vector_gets_a_thousandth_of_the_sign(shape):
    grads = [normal(shape, i) for i in range(3)]
    mean = averaged(grads)
    assert_close(last(fp.splus(), grads), 0.001 * torch.sign(mean), rtol=1e-14)


def test_what_has_no_gradient_gets_no_step():
    """A row of zeros stays one, whatever rounding the rotation leaves in it."""
    grads = [normal((4, 3), i) for i in range(5)]
    for g in grads:
        g[2] = 0
    direction = last(fp.splus(), grads)
    assert direction[2].abs().max() < 1e-12
    assert direction[1].abs().max() > 0.1


def test_statistics_see_the_gradient_after_the_step():
    opt, g = fp.splus(), normal((4, 3))
    state, _ = opt.update(opt.init({"w": g}), {"w": g}, due(opt, 0))
    assert_close(state.statistics["w"][0], 0.001 * g @ g.T, rtol=1e-10)
    second = normal((4, 3), 1)
    same, _ = opt.update(state, {"w": second}, due(opt, 1))
    assert torch.equal(same.bases["w"][0], state.bases["w"][0])
