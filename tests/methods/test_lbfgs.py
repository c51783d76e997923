"""L-BFGS against torch's, dense BFGS and quadratics."""

import itertools

import pytest
import torch

import funcprecond as fp
from funcprecond.autodiff.origin import trusted
from funcprecond.linalg.bfgs import bfgs_update
from tests import reference
from tests.equality import assert_close, assert_same
from tests.problems import convnet, mlp, normal, regression, seeded, train, update
from tests.strategies import with_spectrum


def quadratic(n=7, seed=0):
    """``(x - c)^T A x / 2`` with its matrix, by a batch that only has a length."""
    h = with_spectrum(torch.logspace(-1, 1, n, dtype=torch.float64), seed)
    c = normal((n,), seed + 1)

    def model(params, inputs):
        r = params["x"] - c
        return (r @ h @ r / 2).expand(len(inputs))

    params = {"x": normal((n,), seed + 2)}
    return fp.problem(model, lambda outputs, targets: outputs.mean(), params=params), h, c


BATCH = (torch.zeros(2), torch.zeros(2))


def step(problem, opt, params, state, batch=BATCH, t=1, rate=1.0):
    evidence = fp.observe(problem, params, batch, opt.needs(t), generator=seeded(t))
    state, d = opt.update(state, evidence.grads, evidence)
    return fp.apply(params, {k: rate * x for k, x in d.items()}), state, d, evidence


@pytest.mark.parametrize("pairs", ["successive", "same_batch"])
def test_equals_torchs_on_one_batch(pairs):
    toy = regression()
    x, y = toy.batch
    opt = fp.lbfgs(history=4, pairs=pairs, min_curvature=0.0)
    params, state = toy.params, opt.init(toy.params)
    theirs = {k: torch.nn.Parameter(p.clone()) for k, p in params.items()}
    options = {"lr": 0.2, "max_iter": 1, "history_size": 4}
    peer = torch.optim.LBFGS(theirs.values(), **options, tolerance_grad=0.0, tolerance_change=0.0)

    def closure():
        peer.zero_grad()
        loss = toy.problem.loss(toy.problem(theirs, x), y)
        loss.backward()
        return loss

    for t in range(12):
        peer.step(closure)
        params, state, _, _ = step(toy.problem, opt, params, state, toy.batch, t, 0.2)
        assert_close(params, {k: p.detach() for k, p in theirs.items()}, rtol=1e-8)


def test_until_there_is_a_pair_the_step_is_short():
    toy = mlp()
    opt = fp.lbfgs()
    _, d, evidence = update(toy, opt)
    g = evidence.grads
    one = sum(x.abs().sum() for x in g.values())
    assert_close(d, {k: x * min(1.0, 1 / one) for k, x in g.items()}, rtol=1e-12)
    small = {k: x / (10 * one) for k, x in g.items()}
    _, d = opt.update(opt.init(toy.params), small, evidence)
    assert_close(d, small, rtol=1e-12)


def test_directions_are_those_of_dense_bfgs():
    problem, h, _ = quadratic()
    opt = fp.lbfgs(history=3)
    params, state = problem.params, opt.init(problem.params)
    points = []
    for t in range(6):
        points.append(params["x"])
        before = params
        params, state, d, evidence = step(problem, opt, params, state, t=t, rate=0.3)
        if t == 0:
            continue
        s = torch.stack(points).diff(dim=0)[-3:]
        y = s @ h
        inverse = (s[-1] @ y[-1]) / (y[-1] @ y[-1]) * reference.eye(7)
        for a, b in zip(s, y, strict=True):
            inverse = bfgs_update(inverse, a, b)
        torch.testing.assert_close(d["x"], inverse @ evidence.grads["x"], rtol=1e-8, atol=1e-10)
        assert torch.equal(evidence.params["x"], before["x"])


def test_pairs_of_one_batch_have_both_gradients_on_it():
    toy = regression()
    opt = fp.lbfgs(history=2, min_curvature=0.0)
    params, state = toy.params, opt.init(toy.params)
    previous = None
    for t in range(4):
        batch = toy.at(t)
        here = params
        params, state, _, _ = step(toy.problem, opt, params, state, batch, t, 0.1)
        if previous is not None:
            x, y = batch
            loss = lambda p, x=x, y=y: toy.problem.loss(toy.problem(p, x), y)  # noqa: E731
            now, then = torch.func.grad(loss)(here), torch.func.grad(loss)(previous)
            s = reference.ravel(here) - reference.ravel(previous)
            change = reference.ravel(now) - reference.ravel(then)
            assert s @ change > 0
            torch.testing.assert_close(state.history.steps[-1], s)
            torch.testing.assert_close(state.history.changes[-1], change)
        previous = here
    assert int(state.history.filled()) == 2


def test_hvp_pairs_are_products_with_differences_of_means():
    problem, h, _ = quadratic()
    opt = fp.lbfgs(pairs="hvp", every=3, history=5)
    params, state = problem.params, opt.init(problem.params)
    points = []
    for t in range(8):
        assert (fp.Every("pair", 3) in opt.needs(t)) == (t in (3, 6))
        points.append(params["x"])
        params, state, _, _ = step(problem, opt, params, state, t=t, rate=0.2)
    means = [torch.stack(points[:4]).mean(0), torch.stack(points[4:7]).mean(0)]
    expected = torch.stack([means[0] - problem.params["x"], means[1] - means[0]])
    torch.testing.assert_close(state.history.steps[-2:], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state.history.changes[-2:], expected @ h, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("line_search", ["armijo", "wolfe"])
def test_a_line_search_solves_a_quadratic(line_search):
    problem, _, c = quadratic()
    opt = fp.lbfgs(line_search=line_search)
    params, state = problem.params, opt.init(problem.params)
    losses = []
    for t in range(60):
        params, state, _, evidence = step(problem, opt, params, state, t=t)
        losses.append(float(evidence.loss))
    assert all(b <= a + 1e-15 for a, b in itertools.pairwise(losses))
    torch.testing.assert_close(params["x"], c, rtol=1e-6, atol=1e-6)


def test_powell_keeps_a_pair_along_negative_curvature():
    def model(params, inputs):
        return torch.cos(params["x"]).sum().expand(len(inputs))

    start = {"x": torch.full((3,), 0.1, dtype=torch.float64)}
    problem = fp.problem(model, lambda outputs, targets: outputs.mean(), params=start)
    for fix, count in (("none", 0), ("powell", 1)):
        opt = fp.lbfgs(curvature_fix=fix)
        params, state = start, opt.init(start)
        for t in range(2):
            params, state, _, _ = step(problem, opt, params, state, t=t)
        assert int(state.history.filled()) == count
    s, y = state.history.steps[-1], state.history.changes[-1]
    # γ was 1 before the first pair, so B s = s.
    torch.testing.assert_close(s @ y, 0.2 * s @ s)


def test_the_default_history_is_a_fixed_shape_and_a_bad_gradient_leaves_it_alone():
    toy = mlp()
    opt = fp.lbfgs(history=3)
    params, state, _ = train(toy, fp.chain(opt, fp.scale(0.1)), 3)
    before = state[0]
    evidence = fp.observe(toy.problem, params, toy.batch, opt.needs(3))
    bad = {k: x * torch.nan for k, x in evidence.grads.items()}
    broken = fp.Evidence(
        evidence.params,
        evidence.loss,
        evidence.outputs,
        bad,
        evidence.buffers,
        evidence.measured,
        trusted(bad),
    )
    after, d = opt.update(before, bad, broken)
    assert_same(after.history, before.history)
    assert all(x.isnan().all() for x in d.values())


def test_zero_gradients_have_zero_directions():
    toy = mlp()
    opt = fp.lbfgs()
    state, _, evidence = update(toy, opt, 2)
    zero = {k: torch.zeros_like(x) for k, x in evidence.grads.items()}
    _, d = opt.update(state, zero, evidence)
    assert_same(d, zero)
    _, d = opt.update(opt.init(toy.params), zero, evidence)
    assert_same(d, zero)


def test_a_subset_of_the_parameters_moves_alone():
    toy = convnet()
    opt = fp.partition([("4.*", "a"), ("*", "b")], a=fp.lbfgs(history=2), b=fp.sgd())
    _, state, _ = train(toy, fp.chain(opt, fp.scale(0.1)), 3)
    size = sum(toy.params[k].numel() for k in ("4.weight", "4.bias"))
    assert state[0].inner["a"].history.steps.shape == (2, size)
    assert set(state[0].inner["a"].point) == {"4.weight", "4.bias"}


def test_it_says_what_is_missing_or_wrong():
    opt = fp.lbfgs()
    g = {"x": torch.ones(2)}
    with pytest.raises(fp.MissingEvidence, match="parameters"):
        opt.update(opt.init(g), g)
    for options in (
        {"pairs": "overlap"},
        {"curvature_fix": "x"},
        {"line_search": "x"},
        {"history": 0},
        {"every": 0},
    ):
        with pytest.raises(ValueError, match=r"must be"):
            fp.lbfgs(**options)
