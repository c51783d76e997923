import pytest
import torch

import funcprecond as fp
from tests.equality import assert_close, assert_same
from tests.peers import run, run_torch


def test_before_momentum_it_is_torch_optim_sgds_l2_penalty():
    ours = run(fp.chain(fp.weight_decay(0.3), fp.momentum(0.9), fp.scale(0.05)), 20)
    peer = run_torch(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.3), 20)
    assert_close(ours, peer, rtol=1e-12)


def test_after_adam_it_is_decoupled_and_differs_from_the_penalty():
    after = run(fp.chain(fp.adam(), fp.weight_decay(0.3), fp.scale(0.01)), 20)
    before = run(fp.chain(fp.weight_decay(0.3), fp.adam(), fp.scale(0.01)), 20)
    peer = run_torch(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3), 20)
    assert_close(after, peer, rtol=1e-12)
    assert (after[-1]["matrix"] - before[-1]["matrix"]).norm() > 1e-3


def test_the_mask_chooses_which_parameters_decay(randn):
    params, grads = ({"w": randn(2, 2), "b": randn(2)} for _ in range(2))
    evidence = fp.Evidence(params, None, None, grads, {}, {})
    opt = fp.weight_decay(0.5, mask=lambda name, p: p.ndim > 1)
    _, direction = opt.update(opt.init(params), grads, evidence)
    assert_same(direction["b"], grads["b"])
    assert_close(direction["w"], grads["w"] + 0.5 * params["w"], rtol=1e-14)


def test_without_evidence_it_says_that_it_needs_the_parameters(randn):
    with pytest.raises(fp.MissingEvidence, match="needs the parameters"):
        fp.weight_decay(0.1).update((), {"w": randn(2)})
