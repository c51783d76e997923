"""AD-1 to AD-4, and torch.optim's Adam and AdamW step by step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcprecond as fp
from tests import strategies
from tests.equality import assert_close, assert_same, copy
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
    ours = run(fp.chain(fp.adamw(weight_decay=0.3), fp.scale(1e-2)), 100, dtype)
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


# ---------------------------------------------------------------------- many tensors at once
def mixed(seed):
    """Parameters of several dtypes, one of them without entries."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float32)
    shapes = ((3, 4), (5,), (2, 3), (0,))
    pairs = enumerate(zip(shapes, dtypes, strict=True))
    return {f"p{i}": normal(s, seed + i).to(d) for i, (s, d) in pairs}


def evidence(params):
    return fp.Evidence(params, torch.zeros(()), None, {}, {}, {})


def test_one_tensor_at_a_time_gives_what_many_at_once_do():
    """A tensor among the hyperparameters takes the first way, numbers the second."""
    params, ends = mixed(0), []
    for beta in (0.9, torch.tensor(0.9, dtype=torch.float64)):
        opt = fp.adamw(betas=(beta, 0.99), weight_decay=0.3)
        state, direction = opt.init(params), {}
        for t in range(5):
            state, direction = opt.update(state, mixed(10 * t), evidence(params))
        ends.append((state, direction))
    for k, p in params.items():
        rtol = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[p.dtype]
        assert_close(*(d[k] for _, d in ends), rtol=rtol)
        assert ends[0][1][k].dtype == p.dtype
        assert_close(*(s.second_moment[k] for s, _ in ends), rtol=1e-6)


@pytest.mark.parametrize("opt", [fp.adam(), fp.adamw()])
def test_what_goes_in_stays_as_it_was(opt):
    params, grads = mixed(0), mixed(1)
    state, _ = opt.update(opt.init(params), grads, evidence(params))
    before = copy((state, grads, params))
    new, direction = opt.update(state, grads, evidence(params))
    assert_same((state, grads, params), before)
    old = {x.data_ptr() for x in fp.tree.leaves((state, grads, params)) if x.numel()}
    assert old.isdisjoint(x.data_ptr() for x in fp.tree.leaves((new, direction)) if x.numel())


def test_adamw_is_adam_and_decoupled_decay():
    params = mixed(0)
    chained = fp.chain(fp.adam(), fp.weight_decay(0.3))
    one, other = fp.adamw(weight_decay=0.3), chained
    a, b = one.init(params), other.init(params)
    for t in range(3):
        a, direction = one.update(a, mixed(t), evidence(params))
        b, expected = other.update(b, mixed(t), evidence(params))
    assert_same(a, b[0])
    del direction["p2"], expected["p2"]  # in bfloat16 the chain rounds once more
    assert_close(direction, expected, rtol=1e-6)


def test_adamw_asks_for_the_parameters(randn):
    g = {"w": randn(2)}
    with pytest.raises(fp.MissingEvidence, match="parameters"):
        fp.adamw().update(fp.adamw().init(g), g)


def test_autograd_flows_through_updates(randn):
    """Where it records, nothing that it kept may change in place."""
    x = {"w": randn(3)}

    def size(scale):
        opt = fp.adamw(damping=0.1)
        state, _ = opt.update(opt.init(x), {"w": scale * x["w"]}, evidence(x))
        return opt.update(state, {"w": scale**2 * x["w"]}, evidence(x))[1]["w"].sum()

    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(size(scale), scale)
    with torch.no_grad():
        numeric = (size(scale + 1e-6) - size(scale - 1e-6)) / 2e-6
    assert slope.item() == pytest.approx(numeric.item(), rel=1e-6)


def test_a_model_without_parameters_is_no_error():
    opt = fp.adam()
    assert opt.update(opt.init({}), {})[1] == {}
