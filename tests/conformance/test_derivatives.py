"""Training steps are differentiable: in the rate, the damping, the start and the data."""

import inspect

import pytest
import torch
from torch import nn

import funcprecond as fp
from funcprecond.methods.card import CARDS
from tests import problems
from tests.conformance.methods import build, every_method, line
from tests.equality import assert_close
from tests.problems import normal, seeded

STEPS, STEP = 3, 1e-5


def dead_unit():
    """A ReLU network in which one unit is never active, so that its gradients are zero."""
    model = problems.initialised(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)))
    with torch.no_grad():
        model[0].bias[1] = -50.0
    return model


def layer_norm():
    layers = nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)
    return problems.initialised(nn.Sequential(*layers))


MODELS = {"ReLU": dead_unit, "LayerNorm": layer_norm}


def trained(name, problem, batch):
    """The loss after training, as a function of (rate, damping, start, data), all relative."""
    options = dict(line(name).options)
    ways = inspect.signature(CARDS[name].build).parameters
    key = next((k for k in ("damping", "epsilon") if k in ways), None)
    start = options.get(key, ways[key].default) if key else None
    directions = {k: normal(p.shape, 5 + i) for i, (k, p) in enumerate(problem.params.items())}
    opt = build(name)
    noises = [
        fp.draw(problem, problem.params, batch, opt.needs(t), generator=seeded(t))
        for t in range(STEPS)
    ]

    def run(x):
        rate, damping, shift, data = x
        more = {} if start is None else {key: start * (1 + damping)}
        opt, inputs = build(name, **more), (batch[0] * (1 + data), batch[1])
        params = {k: p + shift * directions[k] for k, p in problem.params.items()}
        state = opt.init(params)
        for t in range(STEPS):
            evidence = fp.observe(problem, params, inputs, opt.needs(t), noise=noises[t])
            state, direction = opt.update(state, evidence.grads, evidence)
            params = fp.apply(params, direction, 0.02 * (1 + rate))
        return fp.observe(problem, params, inputs).loss

    return run


def differences(run):
    """Central differences of the fourth order."""

    def slope(e):
        return (8 * (run(e) - run(-e)) - (run(2 * e) - run(-2 * e))) / (12 * STEP)

    return torch.stack([slope(e) for e in STEP * torch.eye(4, dtype=torch.float64)])


def by_grad(run):
    return torch.func.grad(run)(torch.zeros(4, dtype=torch.float64))


def by_autograd(run):
    x = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(run(x), x)[0]


def by_jvp(run):
    zero = torch.zeros(4, dtype=torch.float64)
    return torch.stack([torch.func.jvp(run, (zero,), (e,))[1] for e in torch.eye(4).double()])


@pytest.mark.parametrize("model", MODELS)
@every_method
def test_three_steps_have_the_derivatives_of_differences(name, model):
    problem = fp.problem(MODELS[model](), fp.losses.cross_entropy)
    run = trained(name, problem, problems.mlp().batch)
    expected = differences(run)
    atol = 1e-5 * float(expected.abs().max())
    for way in (by_grad, by_autograd, by_jvp):
        assert_close(way(run), expected, rtol=1e-4, atol=atol)
