"""AD-1 to AD-4, and torch.optim's Adam and AdamW step by step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcprecond as fp
from tests import strategies
from tests.equality import assert_close
from tests.peers import run, run_torch
from tests.problems import normal

BETAS = st.tuples(st.floats(0, 0.99), st.floats(0, 0.9999))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_adam_equals_torch_optim_adam_over_100_steps(dtype, rtol):
    ours = run(fp.chain(fp.adam(betas=(0.8, 0.99)), fp.scale(1e-2)), 100, dtype)
    peer = run_torch(lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.8, 0.99)), 100, dtype)
    assert_close(ours, peer, rtol=rtol)


def test_adam_with_decay_before_it_equals_torch_optim_adams_l2_penalty():
    ours = run(fp.chain(fp.weight_decay(0.3), fp.adam(), fp.scale(1e-2)), 30)
    peer = run_torch(lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.3), 30)
    assert_close(ours, peer, rtol=1e-12)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_adamw_equals_torch_optim_adamw_over_100_steps(dtype, rtol):
    ours = run(fp.chain(fp.adamw(decay_rate=0.3), fp.scale(1e-2)), 100, dtype)
    peer = run_torch(lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3), 100, dtype)
    assert_close(ours, peer, rtol=rtol)


@given(betas=BETAS, seed=strategies.seeds)
def test_the_first_step_is_the_sign_whatever_the_betas(betas, seed):
    g = normal((5,), seed)
    opt = fp.adam(betas=betas, damping=0.1)
    _, direction = opt.update(opt.init({"w": g}), {"w": g})
    assert_close(direction["w"], g / (g.abs() + 0.1), rtol=1e-9)


@given(betas=BETAS, seed=strategies.seeds)
def test_constant_gradients_have_a_constant_direction(betas, seed):
    g = normal((4,), seed)
    opt = fp.adam(betas=betas, damping=1e-2)
    state = opt.init({"w": g})
    for _ in range(10):
        state, direction = opt.update(state, {"w": g})
    assert_close(direction["w"], g / (g.abs() + 1e-2), rtol=1e-8)


def test_without_mean_it_is_rmsprop_with_a_corrected_average(randn):
    opt = fp.adam(betas=(0.0, 0.9))
    rms = fp.adagrad(damping=1e-8, decay=0.9)
    grads = [{"w": randn(3, 2)} for _ in range(5)]
    s, r = opt.init(grads[0]), rms.init(grads[0])
    for g in grads:
        s, direction = opt.update(s, g)
        r, expected = rms.update(r, g)
    assert_close(direction, expected, rtol=1e-12)


def test_moments_of_half_precision_gradients_are_kept_in_float32(randn):
    g = {"w": 1e-4 * randn(3, dtype=torch.float16)}
    opt = fp.adam()
    state, direction = opt.update(opt.init(g), g)
    assert state.second_moment["w"].dtype == torch.float32
    assert state.second_moment["w"].all()
    assert direction["w"].dtype == torch.float16


def test_hyperparameters_may_be_tensors_that_gradients_flow_to(randn):
    g = {"w": randn(3)}

    def size(b1):
        opt = fp.adam(betas=(b1, 0.99))
        state, _ = opt.update(opt.init(g), g)
        return opt.update(state, {"w": 2 * g["w"]})[1]["w"].sum()

    b1 = torch.tensor(0.9, dtype=torch.float64)
    numeric = (size(b1 + 1e-6) - size(b1 - 1e-6)) / 2e-6
    assert torch.func.grad(size)(b1) == pytest.approx(numeric.item(), rel=1e-6)
