import torch

import funcprecond as fp
from tests.equality import assert_close, assert_same
from tests.peers import run, run_torch


def test_sgd_is_the_identity(randn):
    grads = {"w": randn(2, 3), "b": randn(3)}
    state, direction = fp.sgd().update(fp.sgd().init(grads), grads)
    assert_same(direction, grads)
    assert state == ()


def test_sgd_equals_torch_optim_sgd():
    ours = run(fp.chain(fp.sgd(), fp.scale(0.1)), 20)
    assert_close(ours, run_torch(lambda p: torch.optim.SGD(p, lr=0.1), 20), rtol=1e-13)
