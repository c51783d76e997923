"""Gradients whose squares underflow: every method stays finite, and none explodes.

In float32 the square of 1e-20 is 0, or keeps one digit among the numbers below the normal ones.
A deep network of sigmoids has such gradients in its first layers, and usual ones in its last.
"""

import pytest
import torch
from torch import nn

import funcprecond as fp
from tests.conformance.methods import build, every_method
from tests.equality import finite
from tests.problems import normal, seeded

# 1 / sqrt(epsilon) of Shampoo's ridge, the largest factor between a direction and a sign.
BOUND = 1e3


def directions(problem, opt, batch, steps):
    """The direction and the state of each step at the initial parameters."""
    state = opt.init(problem.params)
    for t in range(steps):
        evidence = fp.observe(problem, problem.params, batch, opt.needs(t), generator=seeded(t))
        state, direction = opt.update(state, evidence.grads, evidence)
        yield direction, state, evidence.grads


def largest(tensors):
    return max(float(x.abs().max()) for x in tensors.values())


@every_method
def test_a_deep_network_of_sigmoids(name):
    layers = [m for _ in range(24) for m in (nn.Linear(4, 4), nn.Sigmoid())]
    module = nn.Sequential(*layers, nn.Linear(4, 3)).float()
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(normal(p.shape, i) / 4)
    batch = normal((6, 4), 1).float(), torch.arange(6) % 3
    problem = fp.problem(module, fp.losses.cross_entropy)
    for direction, state, grads in directions(problem, build(name), batch, 4):
        assert 0 < float(grads["0.weight"].abs().max()) < 1e-20
        assert finite((direction, state))
        assert largest(direction) < BOUND


@every_method
@pytest.mark.parametrize("scale", [1e-19, 1e-20, 1e-22, 1e-30, 1e-42, 0.0])
def test_gradients_of_a_scaled_loss(name, scale):
    """Some rows, columns and entries of the gradient are exactly zero."""

    def model(params, x):
        hidden = torch.tanh(x @ params["w"].mT + params["b"]) @ params["v"].mT
        return scale * hidden * torch.tensor([1.0, 0.0, 1.0])

    params = {
        k: normal(shape, i).float()
        for i, (k, shape) in enumerate({"w": (4, 5), "b": (4,), "v": (3, 4)}.items())
    }
    x = normal((6, 5), 7).float()
    x[:, 2] = 0
    problem = fp.problem(model, fp.losses.cross_entropy, params=params)
    batch = x, torch.arange(6) % 3
    for direction, state, _ in directions(problem, build(name), batch, 3):
        assert finite((direction, state))
        assert largest(direction) < (BOUND if scale else 1e-6)


@pytest.mark.parametrize("name", ["shampoo", "caspr", "one_sided_shampoo", "adagrad_full"])
@pytest.mark.parametrize("size", [1e-15, 1e-17, 1e-25])
def test_the_same_direction_at_every_scale_whose_squares_are_normal_numbers(name, size):
    """These methods do not depend on the scale of the gradient; below it, they pass it through."""
    like = {k: normal(s, 3).float() for k, s in {"w": (4, 3), "b": (5,)}.items()}
    like["w"][1] = like["w"][:, 0] = like["b"][2] = 0
    opt = build(name)
    grads = {k: size * g for k, g in like.items()}
    _, found = opt.update(opt.init(grads), grads)
    _, expected = opt.update(opt.init(like), like)
    for k, g in grads.items():
        # The tolerance is for the rows of zeros, which rounding in the eigenvectors reaches.
        right, rounding = (expected[k], 1e-5) if size > 1e-18 else (g, 1e-5 * size)
        torch.testing.assert_close(found[k], right, rtol=1e-3, atol=rounding)


def test_a_graft_onto_a_vanishing_direction_has_the_length_of_the_other():
    direction = fp.chain(fp.sgd(), fp.scale(1e-22))
    opt, grads = fp.graft(direction, fp.sgd()), {"w": torch.tensor([3.0, 4.0])}
    _, found = opt.update(opt.init(grads), grads)
    torch.testing.assert_close(found, grads)
