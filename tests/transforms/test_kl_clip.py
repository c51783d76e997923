import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcprecond as fp
from tests import problems, reference, strategies
from tests.equality import assert_close, assert_same


@given(st.floats(1e-3, 1e3), st.floats(1e-6, 1e3))
def test_the_step_is_the_newton_step_at_the_bound_or_within_it(rate, bound):
    """With one linear layer K-FAC is exact, and the length is the step's in the Fisher metric."""
    problem = fp.problem(problems.initialised(torch.nn.Linear(4, 3)), fp.losses.mse)
    batch = (problems.normal((7, 4)), problems.normal((7, 3), 1))
    opt = fp.kl_clip(fp.kflr(damping=1e-9), rate=rate, bound=bound)
    state, direction, evidence = problems.update(problems.Toy(problem, (batch,)), opt)
    fisher = reference.ggn(problem, problem.params, batch)
    newton = torch.linalg.solve(fisher, reference.ravel(evidence.grads))
    whole = rate**2 * float(newton @ fisher @ newton)
    factor = min(1.0, (bound / whole) ** 0.5)
    d = reference.ravel(direction)
    torch.testing.assert_close(d, factor * newton, rtol=1e-5, atol=1e-7)
    assert float(rate**2 * d @ fisher @ d) <= bound * (1 + 1e-5)
    assert float(state.factor) == pytest.approx(factor, rel=1e-5)


@given(strategies.vectors())
def test_a_direction_against_the_gradient_is_left_alone(grads):
    uphill = fp.chain(fp.sgd(), fp.scale(-1.0))
    opt = fp.kl_clip(uphill, rate=1e3, bound=1e-6)
    state, direction = opt.update(opt.init(grads), grads)
    assert_close(direction, {k: -g for k, g in grads.items()}, rtol=0)
    assert state.factor == 1


def test_it_declares_the_needs_of_its_method():
    inner = fp.kfac(refresh_every=2)
    assert [fp.kl_clip(inner, rate=0.1).needs(t) for t in range(14)] == [
        inner.needs(t) for t in range(14)
    ]


def test_a_bound_can_be_vmapped(randn):
    grads = {"w": randn(3)}
    bounds = torch.tensor([1e-4, 1e-2, 1e9])

    def one(bound):
        opt = fp.kl_clip(fp.sgd(), rate=0.1, bound=bound)
        return opt.update(opt.init(grads), grads)[1]

    assert_same(torch.vmap(one)(bounds)["w"], torch.stack([one(b)["w"] for b in bounds]))
