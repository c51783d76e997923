"""Hessian-free against dense damped Newton steps."""

import pytest
import torch

import funcprecond as fp
from funcprecond.curvature.objective import Objective
from funcprecond.methods.hessian_free import HessianFreeState
from tests import reference
from tests.equality import assert_close, assert_same
from tests.problems import convnet, mlp, normal, regression, train, tree, update
from tests.strategies import with_spectrum

EXACT = {"max_iter": 80, "rule": "none", "tol": 1e-12, "backtracking": 0}
BATCH = (torch.zeros(2), torch.zeros(2))


def quadratic(n=6, values=None):
    values = torch.logspace(-1, 1, n, dtype=torch.float64) if values is None else values
    h, c = with_spectrum(values, 0), normal((n,), 1)

    def model(params, inputs):
        r = params["x"] - c
        return (r @ h @ r / 2).expand(len(inputs))

    params = {"x": normal((n,), 2)}
    return fp.problem(model, lambda outputs, targets: outputs.mean(), params=params), h, c


def step(problem, opt, params, state, batch=BATCH):
    evidence = fp.observe(problem, params, batch, opt.needs(0))
    state, d = opt.update(state, evidence.grads, evidence)
    return fp.apply(params, d), state, d, evidence


@pytest.mark.parametrize("start", [1e-10, 3e-11])
def test_a_convex_quadratic_is_solved_in_one_step(start):
    problem, _, c = quadratic()
    opt = fp.hessian_free(curvature="hessian", damping=start, **EXACT)
    params, state, _, evidence = step(problem, opt, problem.params, opt.init(problem.params))
    torch.testing.assert_close(params["x"], c, rtol=1e-8, atol=1e-8)
    # The ratio is 1 and the whole step is taken.
    torch.testing.assert_close(float(state.damping), start * 2 / 3, rtol=1e-15, atol=0)
    torch.testing.assert_close(state.solution["x"], c - problem.params["x"], rtol=1e-8, atol=1e-8)
    assert float(evidence.loss) > float(problem.loss(problem(params, BATCH[0]), None))


def test_an_exact_model_has_ratio_one_from_a_warm_start_too():
    problem, _, _ = quadratic()
    opt = fp.hessian_free(curvature="hessian", damping=1e-6, max_iter=3, rule="none", tol=0.0)
    params, state = problem.params, opt.init(problem.params)
    for t in range(4):
        params, state, _, _ = step(problem, opt, params, state)
        torch.testing.assert_close(float(state.damping), 1e-6 * (2 / 3) ** (t + 1))


@pytest.mark.parametrize(
    ("toy", "curvature"),
    [(mlp, "ggn"), (regression, "ggn"), (convnet, "ggn"), (tree, "ggn"), (regression, "hessian")],
)
@pytest.mark.parametrize("preconditioner", ["none", "fisher"])
def test_the_direction_is_the_dense_damped_newton_step(toy, curvature, preconditioner):
    toy = toy()
    lam = 30.0 if curvature == "hessian" else 0.5
    opt = fp.hessian_free(
        curvature=curvature, damping=lam, preconditioner=preconditioner, trials=1, **EXACT
    )
    _, direction, evidence = update(toy, opt)
    x, y = toy.batch
    if curvature == "ggn":
        b = reference.ggn(toy.problem, toy.params, toy.batch)
    else:
        b = reference.hessian(lambda p: toy.problem.loss(toy.problem(p, x), y), toy.params)
    b = b + lam * reference.eye(len(b))
    expected = torch.linalg.solve(b, reference.ravel(evidence.grads))
    torch.testing.assert_close(reference.ravel(direction), expected, rtol=1e-7, atol=1e-9)


def test_the_damping_follows_the_loss_on_the_batch():
    toy = mlp()
    x, y = toy.batch
    for lam in (1e-4, 1.0):
        opt = fp.hessian_free(damping=lam, **EXACT)
        state, _, evidence = update(toy, opt)
        g, p = reference.ravel(evidence.grads), reference.ravel(state.solution)
        b = reference.ggn(toy.problem, toy.params, toy.batch) + lam * reference.eye(31)
        p = -torch.linalg.solve(b, g)
        there = reference.unravel(reference.ravel(toy.params) + p, toy.params)
        change = toy.problem.loss(toy.problem(there, x), y) - evidence.loss
        ratio = float(change / (g @ p + p @ b @ p / 2))
        factor = 1.5 if ratio < 0.25 else 2 / 3 if ratio > 0.75 else 1.0
        torch.testing.assert_close(float(state.damping), lam * factor)
        zero = {k: torch.zeros_like(v) for k, v in toy.params.items()}
        kept = zero if ratio < 0 else reference.unravel(p, toy.params)
        assert_close(state.solution, kept, rtol=1e-6)
    assert fp.hessian_free(adapt=False, **EXACT).init(toy.params).damping == 1.0


def test_no_adaptation_keeps_the_damping():
    state, _, _ = update(mlp(), fp.hessian_free(damping=0.3, adapt=False, max_iter=3), 3)
    assert float(state.damping) == 0.3


def test_every_step_descends_on_its_batch_and_training_gets_far():
    toy = mlp()
    opt = fp.hessian_free(max_iter=30)
    params, state = toy.params, opt.init(toy.params)
    for _ in range(15):
        previous = params
        params, state, _, evidence = step(toy.problem, opt, params, state, toy.batch)
        loss = toy.problem.loss(toy.problem(params, toy.batch[0]), toy.batch[1])
        assert loss <= evidence.loss
    assert float(loss) < 0.05
    assert previous.keys() == params.keys()


def test_the_warm_start_is_a_share_of_the_last_solution():
    toy = mlp()
    opt = fp.hessian_free(zeta=0.5, max_iter=1, rule="none", tol=1e9, adapt=False)
    # With this tolerance CG ends at once, where it starts.
    old = HessianFreeState(
        {k: 0.1 * normal(p.shape, 5) for k, p in toy.params.items()},
        torch.ones((), dtype=torch.float64),
    )
    evidence = fp.observe(toy.problem, toy.params, toy.batch, opt.needs(0))
    state, _ = opt.update(old, evidence.grads, evidence)
    # No descent was promised: the ratio is the worst, and the start goes back to zero.
    assert_same(state.solution, {k: torch.zeros_like(p) for k, p in toy.params.items()})
    opt = fp.hessian_free(zeta=0.5, adapt=False, **{**EXACT, "max_iter": 200})
    state, _ = opt.update(old, evidence.grads, evidence)
    cold, _ = opt.update(opt.init(toy.params), evidence.grads, evidence)
    assert_close(state.solution, cold.solution, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_a_gradient_that_cannot_be_solved_for_has_direction_zero(value):
    toy = mlp()
    opt = fp.hessian_free(max_iter=5)
    state, _, evidence = update(toy, opt, 2)
    bad = {k: torch.full_like(x, value) for k, x in evidence.grads.items()}
    after, d = opt.update(state, bad, evidence)
    assert_same(d, {k: torch.zeros_like(x) for k, x in bad.items()})
    assert_same(after, state)


def test_no_point_with_enough_descent_is_no_step():
    toy = regression()
    opt = fp.hessian_free(max_iter=5, trials=3)
    evidence = fp.observe(toy.problem, toy.params, toy.batch, opt.needs(0))
    # Uphill: minus the gradient, on the same loss.
    uphill = {k: -x for k, x in evidence.grads.items()}
    _, d = opt.update(opt.init(toy.params), uphill, evidence)
    assert all((x == 0).all() for x in d.values())


def test_an_indefinite_hessian_still_descends():
    values = torch.tensor([3.0, 1.0, -2.0], dtype=torch.float64)
    problem, _, _ = quadratic(3, values)
    opt = fp.hessian_free(curvature="hessian", damping=1e-3)
    params, _, d, evidence = step(problem, opt, problem.params, opt.init(problem.params))
    assert evidence.grads["x"] @ d["x"] > 0
    assert problem.loss(problem(params, BATCH[0]), None) < evidence.loss


def test_backtracking_takes_the_iterate_of_least_loss():
    toy = mlp()
    none, some = (fp.hessian_free(damping=1e-6, max_iter=60, backtracking=n) for n in (0, 20))
    losses = {}
    for name, opt in (("none", none), ("some", some)):
        _, direction, evidence = update(toy, opt)
        losses[name] = float(evidence[Objective()].loss(fp.apply(toy.params, direction)))
    assert losses["some"] <= losses["none"]


def test_a_subset_of_the_parameters_is_solved_for_alone():
    toy = mlp()
    names = ["2.weight", "2.bias"]
    opt = fp.partition(
        [("2.*", "a"), ("*", "b")],
        a=fp.hessian_free(damping=0.2, trials=1, preconditioner="fisher", **EXACT),
        b=fp.sgd(),
    )
    _, direction, evidence = update(toy, opt)
    columns = dict(
        zip(
            toy.params,
            torch.arange(31).split([p.numel() for p in toy.params.values()]),
            strict=True,
        )
    )
    rows = torch.cat([columns[k] for k in names])
    block = reference.ggn(toy.problem, toy.params, toy.batch)[rows][:, rows]
    g = reference.ravel({k: evidence.grads[k] for k in names})
    expected = torch.linalg.solve(block + 0.2 * reference.eye(len(rows)), g)
    found = reference.ravel({k: direction[k] for k in names})
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_float32_parameters_have_float32_directions_and_damping():
    toy = mlp(torch.float32)
    state, direction, _ = update(toy, fp.hessian_free(max_iter=4))
    assert {x.dtype for x in (*direction.values(), state.damping)} == {torch.float32}
    params, _, _ = train(toy, fp.hessian_free(max_iter=4), 2)
    assert all(torch.isfinite(p).all() for p in params.values())


def test_it_says_what_is_missing_or_wrong():
    opt = fp.hessian_free()
    g = {"x": torch.ones(2)}
    with pytest.raises(fp.MissingEvidence, match="GGNOperator"):
        opt.update(opt.init(g), g)
    for options in (
        {"curvature": "fisher"},
        {"rule": "2011"},
        {"preconditioner": "x"},
        {"max_iter": 0},
        {"trials": 0},
    ):
        with pytest.raises(ValueError, match=r"must be"):
            fp.hessian_free(**options)
