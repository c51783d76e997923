"""torch.vmap over an ensemble equals the loop; a compiled step equals the eager one."""

import functools

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_map

import funcprecond as fp
from tests import problems
from tests.conformance.methods import every_method, intervals, line, trained
from tests.equality import assert_close
from tests.problems import seeded

MEMBERS = 3


def stack(trees):
    return tree_map(lambda *x: torch.stack(x), *trees)


def member(tree, i):
    return tree_map(lambda x: x[i], tree)


@every_method
def test_vmap_over_an_ensemble_equals_the_loop(name):
    toy, opt = problems.mlp(), trained(name)
    step = fp.make_step(toy.problem, opt)
    params = [
        {k: p + 0.1 * problems.normal(p.shape, i) for k, p in toy.params.items()}
        for i in range(MEMBERS)
    ]
    looped = [(p, opt.init(p), None) for p in params]
    states, params = stack([s for _, s, _ in looped]), stack(params)
    for t in range(2):
        batches = [toy.at(t + i) for i in range(MEMBERS)]
        noises = [
            fp.draw(toy.problem, toy.params, b, opt.needs(t), generator=seeded(t + 10 * i))
            for i, b in enumerate(batches)
        ]
        looped = [
            step(p, s, b, t, n) for (p, s, _), b, n in zip(looped, batches, noises, strict=True)
        ]

        def one(p, s, b, n, t=t):
            p, s, evidence = step(p, s, b, t, n)
            return p, s, evidence.loss

        params, states, losses = torch.vmap(one)(params, states, stack(batches), stack(noises))
        for i, (p, s, evidence) in enumerate(looped):
            assert_close(member((params, states, losses), i), (p, s, evidence.loss), rtol=1e-8)


@pytest.mark.compile
@every_method
def test_a_compiled_step_has_one_graph_a_set_of_needs_and_equals_eager(name, monkeypatch):
    toy, opt, steps = problems.mlp(), intervals(name), 4
    eager = problems.train(toy, opt, steps)
    compile_ = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compile_)
    torch._dynamo.reset()
    counters.clear()
    compiled = problems.train(toy, opt, steps, step=fp.make_step(toy.problem, opt, compile=True))
    assert_close(compiled[:2], eager[:2], rtol=1e-8)
    learns = line(name).learns_layers
    distinct = {(opt.needs(t), learns and t == 0) for t in range(steps)}
    assert counters["stats"]["unique_graphs"] == len(distinct)
