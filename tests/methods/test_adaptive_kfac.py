"""Adaptive K-FAC against the paper's algorithm written out with dense matrices."""

import pytest
import torch
from torch import nn

import funcprecond as fp
from funcprecond.curvature.quadratic_form import GGNForm
from tests import problems, reference
from tests.conformance.references import mlp_layers
from tests.equality import assert_close, assert_same

DAMPING, L2, DECAY = 0.5, 0.1, 0.75
EVERY, REFRESH, DAMPING_EVERY, GAMMA_EVERY = 2, 3, 2, 4
OPTIONS = {
    "damping": DAMPING,
    "l2": L2,
    "labels": "exact",
    "decay": fp.RisingDecay(DECAY),
    "every": EVERY,
    "refresh_every": REFRESH,
    "damping_every": DAMPING_EVERY,
    "gamma_every": GAMMA_EVERY,
    "start": 1,
}


def dense_trajectory(toy, steps):
    """The parameters after each step, with λ and γ, by Martens & Grosse's equations alone."""
    omega1, omega2 = 0.95**DAMPING_EVERY, 0.95 ** (GAMMA_EVERY / 2)
    params, last = toy.params, torch.zeros(31, dtype=torch.float64)
    lam, gamma, averages = DAMPING, (DAMPING + L2) ** 0.5, None

    def objective(vector, batch):
        p = reference.unravel(vector, params)
        return toy.problem.loss(toy.problem(p, batch[0]), batch[1]) + L2 / 2 * vector @ vector

    def inverse(gamma):
        matrix = torch.zeros(31, 31, dtype=torch.float64)
        for (a, b), order in zip(averages, orders, strict=True):
            pi = ((a.trace() / len(a)) / (b.trace() / len(b))).sqrt()
            damped = reference.kron(
                b + gamma / pi * reference.eye(len(b)), a + gamma * pi * reference.eye(len(a))
            )
            index = torch.tensor(order)
            matrix[index.unsqueeze(1), index] = torch.linalg.inv(damped)
        return matrix

    for t in range(steps):
        batch, theta = toy.at(t), reference.ravel(params)
        if t % EVERY == 0:
            found = list(mlp_layers(toy.problem, params, batch))
            orders = [order for _, _, _, order in found]
            old = averages or [(0, 0), (0, 0)]
            keep = min(1 - 1 / (t // EVERY + 1), DECAY)
            averages = [
                (keep * x + (1 - keep) * a, keep * y + (1 - keep) * b)
                for (x, y), (a, b, _, _) in zip(old, found, strict=True)
            ]
        gradient = reference.ravel(
            reference.gradient(
                lambda p, b=batch: toy.problem.loss(toy.problem(p, b[0]), b[1]), params
            )
        )
        gradient = gradient + L2 * theta
        curved = reference.ggn(toy.problem, params, batch) + (lam + L2) * reference.eye(31)
        attempts = []
        for g in (gamma, gamma * omega2, gamma / omega2) if t % GAMMA_EVERY == 0 else (gamma,):
            if t % REFRESH == 0 or t % GAMMA_EVERY == 0:
                cached = inverse(g)
            basis = torch.stack([-cached @ gradient, last][: 2 if t else 1], 1)
            best = -torch.linalg.solve(basis.T @ curved @ basis, basis.T @ gradient)
            step = basis @ best
            value = gradient @ step + step @ curved @ step / 2
            attempts.append((float(value), g, step, cached))
        value, gamma, step, cached = min(attempts, key=lambda x: x[0])
        if t % DAMPING_EVERY == 0:
            ratio = float(objective(theta + step, batch) - objective(theta, batch)) / value
            lam *= omega1 if ratio > 0.75 else 1 / omega1 if ratio < 0.25 else 1
        params, last = reference.unravel(theta + step, params), step
        yield params, lam, gamma


def test_every_step_is_the_papers():
    toy, opt = problems.mlp(), fp.adaptive_kfac(**OPTIONS)
    params, state = toy.params, opt.init(toy.params)
    lams, gammas = set(), set()
    for t, (expected, lam, gamma) in enumerate(dense_trajectory(toy, 9)):
        evidence = fp.observe(toy.problem, params, toy.at(t), opt.needs(t))
        state, direction = opt.update(state, evidence.grads, evidence)
        params = fp.apply(params, direction)
        assert_close(params, expected, rtol=1e-6, atol=1e-8)
        assert float(state.damping) == pytest.approx(lam)
        assert float(state.gamma) == pytest.approx(gamma)
        lams.add(lam)
        gammas.add(gamma)
    assert len(lams) > 2
    assert len(gammas) > 1


def test_where_the_model_is_exact_one_step_is_newtons():
    """One linear layer and the squared error: the factors' product and F are the Hessian."""
    problem = fp.problem(problems.initialised(nn.Linear(4, 3)), fp.losses.mse)
    batch = (problems.normal((7, 4)), problems.normal((7, 3), 1))
    opt = fp.adaptive_kfac(damping=1e-9, labels="exact")
    state, direction, evidence = problems.update(problems.Toy(problem, (batch,)), opt)
    hessian = reference.ggn(problem, problem.params, batch)
    expected = torch.linalg.solve(hessian, reference.ravel(evidence.grads))
    torch.testing.assert_close(reference.ravel(direction), expected, rtol=1e-3, atol=1e-4)
    # The loss fell as the model said, so λ falls.
    assert float(state.damping) == pytest.approx(1e-9 * 0.95**5)


def test_the_form_is_the_dense_gauss_newton_matrix_on_the_vectors():
    toy = problems.convnet()
    vectors = [{k: problems.normal(p.shape, i) for k, p in toy.params.items()} for i in range(3)]
    del vectors[2]["0.weight"]
    evidence = fp.observe(toy.problem, toy.params, toy.batch, (GGNForm(),))
    full = [{k: v.get(k, torch.zeros_like(p)) for k, p in toy.params.items()} for v in vectors]
    rows = torch.stack([reference.ravel(v) for v in full])
    expected = rows @ reference.ggn(toy.problem, toy.params, toy.batch) @ rows.T
    torch.testing.assert_close(evidence[GGNForm()](vectors), expected, rtol=1e-9, atol=1e-9)


def test_a_last_step_along_the_direction_is_not_counted_twice():
    """Two equal batches of a problem with one parameter: all directions are one."""
    problem = fp.problem(lambda p, x: p["x"] * x, fp.losses.mse, params={"x": torch.tensor([2.0])})
    batch = (torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [1.0]]))
    opt = fp.adaptive_kfac(damping=0.1, labels="exact")
    params, state = problem.params, opt.init(problem.params)
    for t in range(6):
        evidence = fp.observe(problem, params, batch, opt.needs(t))
        state, direction = opt.update(state, evidence.grads, evidence)
        params = fp.apply(params, direction)
        assert torch.isfinite(params["x"])
    # The least squares solution, 4 / 10.
    torch.testing.assert_close(params["x"], torch.tensor([0.4]), rtol=1e-3, atol=1e-3)


def test_in_a_partition_it_works_on_its_own_block():
    toy = problems.mlp()
    opt = fp.partition(
        [("0.*", "own"), ("*", "rest")],
        own=fp.adaptive_kfac(damping=1.0, labels="exact"),
        rest=fp.sgd(),
    )
    state, direction, evidence = problems.update(toy, opt, steps=2)
    assert_same(direction["2.weight"], evidence.grads["2.weight"])
    assert state.inner["own"].step.keys() == {"0.weight", "0.bias"}


@pytest.mark.parametrize("wrong", [{"decay": 1.0}, {"gamma_every": 0}, {"damping_every": 0}])
def test_wrong_options_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).removesuffix("_every")):
        fp.adaptive_kfac(**wrong)
