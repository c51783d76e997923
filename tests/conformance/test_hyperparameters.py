"""Numbers among the hyperparameters may be 0-d tensors, so that an ensemble can be vmapped."""

import inspect

import pytest
import torch
from torch.utils._pytree import tree_map

import funcprecond as fp
from funcprecond.methods.card import CARDS
from tests import problems
from tests.conformance.methods import METHODS, build, every_method, line
from tests.equality import assert_close
from tests.problems import seeded

NUMBERS = ("damping", "epsilon", "decay", "weight_decay")


def numbers(name: str) -> dict[str, float]:
    """The method's hyperparameters that are numbers, with their values under test."""
    parameters = inspect.signature(CARDS[name].build).parameters
    values = {k: p.default for k, p in parameters.items()} | dict(line(name).options)
    return {k: values[k] for k in NUMBERS if isinstance(values.get(k), float)}


CASES = [(name, k) for name in METHODS if name in CARDS for k in numbers(name)]
every_number = pytest.mark.parametrize(("name", "hyperparameter"), CASES)


def noise_of(toy, opt, steps=2):
    """Randomness is drawn outside of any transform."""
    return [
        fp.draw(toy.problem, toy.params, toy.at(t), opt.needs(t), generator=seeded(t))
        for t in range(steps)
    ]


def direction(name, toy, noise, **options):
    """The second direction on fixed batches, as a function of the hyperparameters."""
    opt = build(name, **options)
    state = opt.init(toy.params)
    for t in range(2):
        evidence = fp.observe(toy.problem, toy.params, toy.at(t), opt.needs(t), noise=noise[t])
        state, d = opt.update(state, evidence.grads, evidence)
    return d


@every_number
def test_a_tensor_does_what_its_number_does(name, hyperparameter):
    value = numbers(name)[hyperparameter]
    tensor = torch.tensor(value, dtype=torch.float64)
    toy = problems.mlp()
    noise = noise_of(toy, build(name))
    expected = direction(name, toy, noise, **{hyperparameter: value})
    assert_close(direction(name, toy, noise, **{hyperparameter: tensor}), expected, rtol=1e-6)


@every_number
def test_vmap_over_a_hyperparameter_is_the_loop(name, hyperparameter):
    value = numbers(name)[hyperparameter]
    values = value * torch.tensor([1.0, 0.9, 0.5], dtype=torch.float64)
    toy = problems.mlp()
    noise = noise_of(toy, build(name))

    def of(v):
        return direction(name, toy, noise, **{hyperparameter: v})

    mapped = torch.vmap(of)(values)
    for i, v in enumerate(values):
        assert_close(tree_map(lambda x, i=i: x[i], mapped), of(v), rtol=1e-6)


@every_method
def test_vmap_over_a_learning_rate_is_the_loop(name):
    """The ensemble of a sweep in one call."""
    toy = problems.mlp()
    noise = noise_of(toy, build(name))

    def trained(rate):
        opt = fp.chain(build(name), fp.scale(rate))
        step, params, state = fp.make_step(toy.problem, opt), toy.params, opt.init(toy.params)
        for t in range(2):
            params, state, _ = step(params, state, toy.at(t), t, noise[t])
        return params

    rates = torch.tensor([0.01, 0.1], dtype=torch.float64)
    mapped = torch.vmap(trained)(rates)
    for i, rate in enumerate(rates):
        assert_close(tree_map(lambda x, i=i: x[i], mapped), trained(rate), rtol=1e-6)
