"""A loss that differentiates the model is no function of its outputs, and this is said."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcprecond as fp
from tests import reference
from tests.equality import assert_close
from tests.problems import initialised, normal


class Field(nn.Module):
    """Values, and the places at which they were taken."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return self.net(x), x


def slopes(outputs, _):
    (slope,) = torch.autograd.grad(outputs[0].sum(), outputs[1], create_graph=True)
    return slope.square().sum(1).mean()


@pytest.fixture
def problem():
    return fp.problem(initialised(Field()), slopes)


BATCH = (normal((5, 2), 3), torch.zeros(5))


def test_the_gradient_and_the_hessian_are_right(problem):
    def plain(p):
        hidden = (BATCH[0] @ p["net.0.weight"].T + p["net.0.bias"]).tanh()
        slope = ((1 - hidden.square()) * p["net.2.weight"]) @ p["net.0.weight"]
        return slope.square().sum(1).mean()

    params = problem.params
    evidence = fp.observe(problem, params, BATCH)
    assert_close(evidence.loss, plain(params), rtol=1e-12)
    assert_close(evidence.grads, torch.func.grad(plain)(params), rtol=1e-10)
    vector = {k: normal(p.shape, 4) for k, p in params.items()}
    expected = reference.difference(lambda p: torch.func.grad(plain)(p), params, vector)
    assert_close(fp.Hessian(problem, params, BATCH) @ vector, expected, rtol=1e-6)


def _step(problem, opt):
    evidence = fp.observe(problem, problem.params, BATCH, opt.needs(0))
    opt.update(opt.init(problem.params), evidence.grads, evidence)


REFUSED = {
    "kfac": lambda p: _step(p, fp.kfac(labels="empirical")),
    "smw_ng": lambda p: _step(p, fp.smw_ng()),
    "hessian_free": lambda p: _step(p, fp.hessian_free()),
    "GGN": lambda p: fp.GGN(p, p.params, BATCH) @ p.params,
    "Fisher": lambda p: fp.Fisher(p, p.params, BATCH, labels="empirical") @ p.params,
    "KroneckerFactored": lambda p: fp.KroneckerFactored(p, p.params, BATCH, labels="empirical"),
    "DiagonalGGN": lambda p: fp.DiagonalGGN(p, p.params, BATCH, labels="empirical"),
    "layer_statistics": lambda p: fp.layer_statistics(p, p.params, BATCH, labels="empirical"),
    "per_sample_grads": lambda p: fp.per_sample_grads(p, p.params, BATCH),
    "per_sample_norms": lambda p: fp.per_sample_norms(p, p.params, BATCH),
    "noise scale": lambda p: fp.gradient_noise_scale(p, p.params, BATCH),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_the_outputs_alone_says_what_to_do(problem, name):
    with pytest.raises(TypeError, match="Take these derivatives in the model"):
        REFUSED[name](problem)


def test_a_penalty_on_a_parameter_that_is_an_output_is_a_function_of_the_outputs():
    def model(p, x):
        return x @ p["w"], p["w"]

    def loss(outputs, y):
        return F.mse_loss(outputs[0], y) + outputs[1].square().sum()

    problem = fp.problem(model, loss, params={"w": normal((3,), 1)})
    batch = (normal((4, 3), 2), normal((4,), 3))
    matrix = fp.GGN(problem, problem.params, batch)
    expected = batch[0].T @ batch[0] / 2 + 2 * torch.eye(3, dtype=torch.float64)
    vector = {"w": normal((3,), 4)}
    assert_close(matrix @ vector, {"w": expected @ vector["w"]}, rtol=1e-10)
