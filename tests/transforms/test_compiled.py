"""What is chained around a method compiles with it, into one graph."""

import functools

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import funcprecond as fp
from tests import problems
from tests.equality import assert_close
from tests.problems import Toy, initialised, seeded

pytestmark = pytest.mark.compile


@pytest.fixture(autouse=True)
def _on_aot_eager(monkeypatch):
    compile_ = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compile_)
    torch._dynamo.reset()
    counters.clear()


def test_every_transform_at_once_is_one_graph():
    toy = problems.mlp()
    routed = fp.partition([("*.bias", "a"), ("*", "b")], a=fp.adam(), b=fp.sgd())
    opt = fp.chain(
        fp.clip_norm(1.0),
        fp.skip_nonfinite(fp.graft(routed, fp.adagrad())),
        fp.momentum(0.9, nesterov=True),
        fp.weight_decay(0.1),
        fp.scale(lambda t: 0.1 / (1 + t)),
    )
    eager = problems.train(toy, opt, 4)
    step = fp.make_step(toy.problem, opt, compile=True)
    assert_close(problems.train(toy, opt, 4, step=step)[:2], eager[:2], rtol=1e-9)
    assert counters["stats"]["unique_graphs"] == 1


def test_buffers_and_masks_go_through_a_compiled_step():
    module = initialised(
        nn.Sequential(
            # A bias before BatchNorm would have rounding errors for a gradient.
            nn.Linear(3, 4, bias=False),
            nn.BatchNorm1d(4),
            nn.Dropout(0.3),
            nn.Linear(4, 3),
        )
    )
    toy = Toy(fp.problem(module, fp.losses.cross_entropy), problems.mlp().batches)
    opt = fp.chain(fp.adam(), fp.scale(0.1))

    def run(step):
        params, state, buffers, loss = toy.params, opt.init(toy.params), toy.problem.buffers, None
        for t in range(3):
            noise = fp.draw(toy.problem, params, toy.at(t), opt.needs(t), generator=seeded(t))
            params, state, evidence = step(params, state, toy.at(t), t, noise, buffers)
            buffers, loss = evidence.buffers, evidence.loss
        return params, state, buffers, loss

    before = {k: b.clone() for k, b in module.named_buffers()}
    eager = run(fp.make_step(toy.problem, opt))
    compiled = run(fp.make_step(toy.problem, opt, compile=True))
    assert_close(compiled, eager, rtol=1e-9)
    assert compiled[2]["1.num_batches_tracked"] == 3
    assert_close(dict(module.named_buffers()), before)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_new_learning_rate_tensor_compiles_nothing_anew():
    toy = problems.mlp()

    def step(rate, params):
        evidence = fp.observe(toy.problem, params, toy.batch)
        return fp.apply(params, fp.scale(rate).update((), evidence.grads, evidence)[1])

    compiled = torch.compile(step, fullgraph=True)
    for rate in (0.1, 0.2, 0.4):
        rate = torch.tensor(rate, dtype=torch.float64)
        assert_close(compiled(rate, toy.params), step(rate, toy.params), rtol=1e-10)
    assert counters["stats"]["unique_graphs"] == 1
