"""torch.vmap over an ensemble equals the loop; a compiled step equals the eager one."""

import functools

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_map

import funcprecond as fp
from funcprecond.methods.card import CARDS
from tests import problems
from tests.conformance.methods import (
    build,
    every_method,
    intervals,
    line,
    needs_single_examples,
    trained,
)
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


NETS = {
    "LayerNorm": lambda: [nn.Linear(3, 4), nn.LayerNorm(4)],
    "BatchNorm": lambda: [nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)],
    "dropout": lambda: [nn.Linear(3, 4), nn.Dropout(0.5)],
}


def members_of(net, name):
    """Members of an ensemble with a batch and noise in common: the step, and its arguments."""
    module = nn.Sequential(*NETS[net](), nn.Tanh(), nn.Linear(4, 3))
    problem = fp.problem(problems.initialised(module), fp.losses.cross_entropy)
    opt, batch = trained(name), problems.mlp().batch
    noise = fp.draw(problem, problem.params, batch, opt.needs(0), generator=seeded(0))
    starts = [
        {k: p + 0.1 * problems.normal(p.shape, i) for k, p in problem.params.items()}
        for i in range(MEMBERS)
    ]
    whole = fp.make_step(problem, opt)

    def step(params, state, buffers=None):
        params, state, seen = whole(params, state, batch, 0, noise, buffers)
        return params, seen.loss, seen.buffers

    return step, starts, [opt.init(p) for p in starts], [problem.buffers] * MEMBERS


@pytest.mark.parametrize("net", NETS)
@every_method
def test_members_may_share_a_batch_and_noise(name, net):
    if needs_single_examples(name) and net == "BatchNorm":
        pytest.skip("per-sample gradients do not exist")
    step, *arguments = members_of(net, name)
    expected = stack([step(*one) for one in zip(*arguments, strict=True)])
    assert_close(torch.vmap(step)(*map(stack, arguments)), expected, rtol=1e-7)


def test_buffers_that_all_members_share_are_refused():
    step, starts, states, _ = members_of("BatchNorm", "sgd")
    with pytest.raises(RuntimeError, match=r"'1' \(BatchNorm1d\) writes into its buffers.*stack"):
        torch.vmap(step)(stack(starts), stack(states))


class Slope(nn.Module):
    """The derivative of a network in its input, by torch.autograd."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.layer(x).tanh().sum(), x, create_graph=True)[0]


def test_a_model_that_needs_torch_func_for_its_own_derivatives_says_so():
    problem = fp.problem(Slope().double(), fp.losses.mse)
    step = fp.make_step(problem, fp.sgd())
    batch = problems.normal((4, 3)), problems.normal((4, 3), 1)
    step(problem.params, (), batch, 0)
    with pytest.raises(RuntimeError, match=r"\(Slope\) takes derivatives.*torch\.func\.grad"):
        torch.vmap(lambda p: step(p, (), batch, 0)[0])(stack([problem.params] * 2))


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


def network():
    """Norm layers with buffers, attention, and products of every layout, for three classes."""
    model = nn.Sequential(
        # Without a bias, whose gradient would be rounding errors, and its direction anything.
        nn.Linear(3, 6, bias=False),
        nn.BatchNorm1d(6),
        nn.Unflatten(1, (3, 2)),
        nn.TransformerEncoderLayer(2, 1, 3, 0.0, batch_first=True),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    problem = fp.problem(problems.initialised(model), fp.losses.cross_entropy)
    return problems.Toy(problem, problems.mlp().batches)


def compiled_by_inductor(name, toy, steps):
    """The results of eager and of donated, compiled training, with all that a user chains."""
    method = build(name, **({"every": 2, "refresh_every": 2} if CARDS[name].has_intervals else {}))
    opt = fp.chain(method, fp.weight_decay(0.1), fp.momentum(0.9))
    ends = []
    for options in ({}, {"compile": True, "donate": True}):
        step = fp.make_step(toy.problem, opt, rate=0.05, **options)
        params, buffers = tree_map(torch.clone, (toy.params, toy.problem.buffers))
        state = opt.init(params)
        for t in range(steps):
            noise = fp.draw(toy.problem, params, toy.at(t), opt.needs(t), generator=seeded(t))
            params, state, evidence = step(params, state, toy.at(t), t, noise, buffers)
            buffers = evidence.buffers
        ends.append((params, state, buffers))
    return ends


QUICK = ("sgd", "adamw", "lbfgs")
by_inductor = pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CARDS]
)


@pytest.mark.compile
@by_inductor
def test_a_step_compiled_by_inductor_equals_the_eager_one(name):
    """Its fusions have lost factors of sums, and copies of what is written over."""
    torch._dynamo.reset()
    eager, compiled = compiled_by_inductor(name, problems.mlp(), 3)
    assert_close(compiled, eager, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.compile
@every_method
def test_a_network_with_buffers_and_attention_compiles(name):
    if needs_single_examples(name):
        pytest.skip("the examples are coupled")
    if name == "splus":
        pytest.skip("in a layer of width 2 it takes the signs of rounding errors")
    torch._dynamo.reset()
    counters.clear()
    eager, compiled = compiled_by_inductor(name, network(), 4)
    # Bases of the state are a choice where eigenvalues are equal up to rounding.
    (params, _, buffers), (expected, _, expected_buffers) = compiled, eager
    assert_close((params, buffers), (expected, expected_buffers), rtol=1e-6)
