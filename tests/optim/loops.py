"""The same training steps by an optimizer, and by the functional loop of the README."""

import copy

import torch
import torch.nn.functional as F

import funcprecond as fp
from funcprecond.methods.card import CARDS
from funcprecond.optim import ModelOptimizer
from funcprecond.optim.model_optimizer import is_watchable
from tests.conformance.methods import line
from tests.problems import mlp, seeded

LR = 0.03
TOY = mlp()


def fresh_model():
    return copy.deepcopy(TOY.problem.module)


def make(name, model, **options):
    """The optimizer of a method with the hyperparameters of the conformance suite."""
    cls = fp.optim.CLASSES[name]
    given = {"lr": LR, **line(name).options, **options}
    return cls(model if issubclass(cls, ModelOptimizer) else model.parameters(), **given)


def is_watched(name):
    return all(map(is_watchable, CARDS[name].build().needs(0)))


def step(opt, model, batch, loss=F.cross_entropy):
    """One step as a user writes it."""
    name = opt.card.name
    opt.zero_grad()
    if not is_watched(name):
        return opt.step(lambda: loss(model(batch[0]), batch[1]))
    if isinstance(opt, ModelOptimizer):
        with opt.watch():
            value = loss(model(batch[0]), batch[1])
    else:
        value = loss(model(batch[0]), batch[1])
    value.backward()
    opt.step()
    return value.detach()


def functional(name, steps, *chained, rates=None, **options):
    """The parameters after some steps of the functional loop."""
    method = CARDS[name].build(**{**line(name).options, **options})
    params, g = TOY.params, seeded(0)
    state = None
    for t in range(steps):
        rate = LR if rates is None else rates[t]
        opt = fp.chain(method, *chained, fp.scale(rate))
        state = opt.init(params) if state is None else state
        evidence = fp.observe(TOY.problem, params, TOY.at(t), opt.needs(t), generator=g)
        state, direction = opt.update(state, evidence.grads, evidence)
        params = fp.apply(params, direction)
    return params


def assert_equal(model, params):
    found = dict(model.named_parameters())
    assert found.keys() == params.keys()
    for k, p in found.items():
        assert torch.equal(p, params[k]), k
