"""SH-1 to SH-7 and X-9."""

import pytest
import torch
from hypothesis import given

import funcprecond as fp
from tests import reference, strategies
from tests.equality import assert_close
from tests.methods.test_adagrad import last
from tests.problems import kronecker_dim, normal
from tests.strategies import orthogonal, with_spectrum

EPSILON = 1e-6


def applied(matrix, g):
    return (matrix @ g.reshape(-1)).reshape(g.shape)


@given(strategies.gradients())
def test_the_direction_is_the_dense_kronecker_product_of_roots(grads):
    expected = applied(reference.shampoo(grads, EPSILON), grads[-1])
    assert_close(last(fp.shampoo(epsilon=EPSILON), grads), expected, rtol=1e-8)


@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 5), (2, 3, 2, 3)])
def test_orders_two_three_and_four_are_the_dense_product_to_1e_10(shape):
    grads = [normal(shape, i) for i in range(60)]
    expected = applied(reference.shampoo(grads, EPSILON), grads[-1])
    assert_close(last(fp.shampoo(epsilon=EPSILON), grads), expected, rtol=1e-10)


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 6)])
def test_the_first_step_is_the_orthogonal_factor(shape):
    g = normal(shape, 1)
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    assert_close(last(fp.shampoo(epsilon=1e-13), [g]), u @ vt, rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 6)])
def test_the_first_step_with_its_ridge_is_known_in_closed_form(shape):
    g, epsilon = normal(shape, 1), 0.1
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    s = s / (s.square() + epsilon * s.max() ** 2).sqrt()
    assert_close(last(fp.shampoo(epsilon=epsilon), [g]), u @ s.diag() @ vt, rtol=1e-10)


@given(strategies.gradients(max_axes=2), strategies.seeds)
def test_shampoo_commutes_with_rotations_of_either_side(grads, seed):
    a, b = orthogonal(grads[0].shape[0], seed), orthogonal(grads[0].shape[1], seed + 1)
    rotated = last(fp.shampoo(), [a @ g @ b for g in grads])
    assert_close(rotated, a @ last(fp.shampoo(), grads) @ b, rtol=1e-6)


@given(strategies.gradients())
def test_the_relative_ridge_makes_shampoo_blind_to_the_gradients_scale(grads):
    for c in (1e-12, 1e-3, 1e12):
        scaled = last(fp.shampoo(), [c * g for g in grads])
        assert_close(scaled, last(fp.shampoo(), grads), rtol=1e-7)


def test_scaling_one_factor_only_rescales_the_direction():
    """SH-5's second half, which tells Shampoo from CASPR."""
    opt, g = fp.shampoo(), normal((4, 3), 0)
    state, _ = opt.update(opt.init({"w": g}), {"w": g})
    rep = state.representation
    left, right = rep.totals["w"]
    other = kronecker_dim(left, 16 * right)
    solver = fp.solver.InverseRoot()
    directions = [
        solver.apply(solver.prepare(r, state.factor), {"w": g})["w"] for r in (rep, other)
    ]
    assert_close(directions[1], directions[0] / 2, rtol=1e-9)


def test_a_vector_has_diagonal_adagrad_with_the_ridge_inside_the_root(randn):
    grads = [randn(6) for _ in range(4)]
    squares = sum(g.square() for g in grads)
    expected = grads[-1] / (squares + EPSILON * squares.max()).sqrt()
    assert_close(last(fp.shampoo(), grads), expected, rtol=1e-12)


@pytest.mark.parametrize("shape", [(3, 1, 4), (1, 3, 4), (3, 4, 1), (1, 3, 1, 4)])
def test_axes_of_length_one_are_as_if_they_were_not_there(shape, randn):
    grads = [randn(3, 4) for _ in range(3)]
    padded = last(fp.shampoo(), [g.reshape(shape) for g in grads])
    assert_close(padded, last(fp.shampoo(), grads).reshape(shape), rtol=1e-10)


def test_shampoo_is_above_full_matrix_adagrad_in_the_theorem(randn):
    """SH-7: eps I + (1/r) sum g g^T <= L^(1/2) kron R^(1/2), with S_i(0) = eps I."""
    m, n, epsilon = 4, 3, 1e-3
    grads = [randn(m, n) * torch.logspace(0, -2, n, dtype=torch.float64) for _ in range(6)]
    left, right = (s + epsilon * reference.eye(len(s)) for s in reference.mode_grams(grads))
    full = sum(torch.outer(g.reshape(-1), g.reshape(-1)) for g in grads) / min(m, n)
    full = full + epsilon * reference.eye(m * n)
    product = reference.kron(reference.power(left, 0.5), reference.power(right, 0.5))
    assert torch.linalg.eigvalsh(product - full).min() > -1e-9
    # And the library's direction is that product's inverse root, up to where the ridge stands.
    state_free = reference.kron(*(reference.power(s, -0.25) for s in (left, right)))
    assert_close(state_free @ state_free, torch.linalg.inv(product), rtol=1e-8)


def test_exponent_one_half_is_shampoo_squared(randn):
    grads = [randn(4, 3) for _ in range(8)]
    expected = applied(reference.shampoo(grads, EPSILON, exponent=0.5), grads[-1])
    assert_close(last(fp.shampoo(exponent=0.5), grads), expected, rtol=1e-8)


def test_a_moving_average_of_constant_gradients_is_constant(randn):
    g = randn(4, 3)
    once, often = (last(fp.shampoo(decay=0.9), [g] * n) for n in (1, 9))
    assert_close(often, once, rtol=1e-8)


def test_a_moving_average_is_the_weighted_sum_of_grams(randn):
    grads, beta = [randn(4, 3) for _ in range(6)], 0.7
    weights = [(1 - beta) * beta ** (5 - i) / (1 - beta**6) for i in range(6)]
    weighted = [w**0.5 * g for w, g in zip(weights, grads, strict=True)]
    expected = applied(reference.shampoo(weighted, EPSILON), grads[-1])
    assert_close(last(fp.shampoo(decay=beta), grads), expected, rtol=1e-9)


def test_between_refreshes_old_roots_meet_the_current_gradient(randn):
    """SS-5: stale until the refresh, fresh at it; statistics are taken all along."""
    grads = [randn(4, 3) for _ in range(7)]
    opt = fp.shampoo(refresh_every=5, start=0)
    state = opt.init({"w": grads[0]})
    for t, g in enumerate(grads):
        evidence = fp.Evidence(None, None, None, None, {}, dict.fromkeys(opt.needs(t), ()))
        state, direction = opt.update(state, {"w": g}, evidence)
        seen = grads[:1] if t < 5 else grads[:6]
        expected = applied(reference.shampoo(seen, EPSILON), g)
        assert_close(direction["w"], expected, rtol=1e-6)


def test_start_refreshes_every_step_of_the_warm_up():
    opt = fp.shampoo(refresh_every=5, start=3)
    due = [any(getattr(n, "what", "") == "refresh" for n in opt.needs(t)) for t in range(11)]
    assert due == [True, True, True, False, False, True, False, False, False, False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gram_product_is_taken_in_float32_or_wider(dtype):
    """The measured failure of another library: a Gram matrix in bfloat16 misses U V^T by 1.8."""
    g = normal((64, 32), 0).to(dtype)
    u, _, vt = torch.linalg.svd(g.double(), full_matrices=False)
    error = (last(fp.shampoo(), [g]).double() - u @ vt).abs().max()
    assert error < (5e-3 if dtype is torch.bfloat16 else 1e-4)


def test_a_zero_gradient_keeps_the_root_that_there_was(randn):
    opt, g = fp.shampoo(decay=None), randn(4, 3)
    state, expected = opt.update(opt.init({"w": g}), {"w": g})
    state, _ = opt.update(state, {"w": torch.zeros_like(g)})
    (left, right), spectrum = state.factor.roots["w"], torch.linalg.eigvalsh(g @ g.T)
    assert_close(left @ g @ right, expected["w"], rtol=1e-10)
    assert spectrum.max() > 0


def test_small_and_large_eigenvalues_meet_the_ridge_not_a_constant():
    """An absolute clamp such as 1e-30 shows here as a root 3e4 times too large."""
    left = with_spectrum(torch.tensor([1.0, 1e-4, 0.0, 0.0], dtype=torch.float64), 0)
    g = 1e-5 * reference.power(left + 1e-300 * reference.eye(4), 0.5)
    state, _ = fp.shampoo().update(fp.shampoo().init({"w": g}), {"w": g})
    largest = torch.linalg.eigvalsh(state.factor.roots["w"][0]).max()
    assert largest == pytest.approx((1e-10 * 1e-6) ** -0.25, rel=1e-3)


@pytest.mark.parametrize("decay", ["sum", 0.9])
@pytest.mark.parametrize("shape", [(6, 5), (5, 5), (4, 3, 5)])
def test_it_follows_metas_trajectory_step_by_step(shape, decay):
    """Runs where facebookresearch/optimizers, which is in no package index, is on the path."""
    meta = pytest.importorskip("distributed_shampoo")
    weight = torch.nn.Parameter(torch.zeros(shape))
    peer = meta.DistributedShampoo(
        [weight],
        lr=1.0,
        betas=(0.0, 1.0 if decay == "sum" else decay),
        epsilon=1e-12,
        precondition_frequency=1,
        distributed_config=meta.SingleDeviceDistributedConfig(
            target_parameter_dimensionality=len(shape)
        ),
    )
    opt = fp.shampoo(epsilon=1e-12, decay=decay)
    state = opt.init({"w": weight.detach()})
    for t in range(8):
        weight.grad = normal(shape, t, torch.float32)
        before = weight.detach().clone()
        state, direction = opt.update(state, {"w": weight.grad.clone()})
        peer.step()
        # Its float32 root of the first statistic, which has the rank of one gradient, is rough.
        tolerance = 1e-2 if t == 0 else 1e-5
        gap = (before - weight.detach() - direction["w"]).norm() / direction["w"].norm()
        assert gap < tolerance
