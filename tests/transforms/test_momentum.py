import pytest
import torch

import funcprecond as fp
from tests.equality import assert_close
from tests.peers import run, run_torch


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-4)])
def test_momentum_equals_torch_optim_sgds(nesterov, dtype, rtol):
    ours = run(fp.chain(fp.momentum(0.9, nesterov=nesterov), fp.scale(0.1)), 30, dtype)
    peer = run_torch(
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=nesterov), 30, dtype
    )
    assert_close(ours, peer, rtol=rtol)


@pytest.mark.parametrize("nesterov", [False, True])
def test_an_average_is_heavy_ball_of_the_scaled_gradient(nesterov):
    average = run(fp.momentum(0.9, nesterov=nesterov, average=True), 10)
    scaled = run(fp.chain(fp.scale(1 - 0.9), fp.momentum(0.9, nesterov=nesterov)), 10)
    assert_close(average, scaled, rtol=1e-12)


def test_torchs_dampening_is_average_after_the_first_step(randn):
    """torch starts its buffer at the first gradient; ours at zero."""
    opt, grads = fp.momentum(0.9, average=True), [{"w": randn(3)} for _ in range(4)]
    state = opt.init(grads[0])
    mean = torch.zeros(3, dtype=torch.float64)
    for g in grads:
        state, direction = opt.update(state, g)
        mean = 0.9 * mean + 0.1 * g["w"]
    assert_close(direction["w"], mean, rtol=1e-13)


def test_the_decay_may_be_a_tensor_under_vmap(randn):
    grads = [{"w": randn(3)} for _ in range(3)]

    def last(decay):
        opt = fp.momentum(decay)
        state = opt.init(grads[0])
        for g in grads:
            state, direction = opt.update(state, g)
        return direction["w"]

    decays = torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64)
    looped = torch.stack([last(float(d)) for d in decays])
    assert_close(torch.vmap(last)(decays), looped, rtol=1e-13)
