"""FOOF against dense solves, and as the ridge regression of output gradients on inputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcprecond as fp
from tests import problems, reference
from tests.equality import assert_close, assert_same, finite
from tests.methods.layer_rows import layer_rows, matrix
from tests.methods.test_skfac import CASES
from tests.problems import Toy, initialised, normal
from tests.representation.test_gram import toy

LAM = 0.07


def ridged(a):
    """(A, A + λ ā I) for rows a, (M, i)."""
    moment = a.T @ a / len(a)
    return moment, moment + LAM * moment.trace() / len(moment) * reference.eye(len(moment))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_the_direction_is_the_dense_solve_with_the_inputs(case, decay, sharing):
    """With ``decay=None`` and few rows through a matrix of the size of the batch."""
    case = CASES[case]()
    opt = fp.foof(damping=LAM, decay=decay, sharing=sharing)
    state, direction, evidence = problems.update(case, opt)
    thin = [x.shape[-2] < x.shape[-1] for x in state.representation.right.values()]
    assert any(thin) == (decay is None)
    for name, (a, g) in layer_rows(case).items():
        if name == "norm":
            assert_close(direction["norm.weight"], evidence.grads["norm.weight"] / (1 + LAM))
            continue
        gradient, found = (matrix(x, name, len(a)) for x in (evidence.grads, direction))
        for j in range(len(a)):
            rows = a[j].mean(1) if sharing == "reduce" else a[j].flatten(0, 1)
            inverse = torch.linalg.inv(ridged(rows)[1])
            dense = reference.kron(reference.eye(g.shape[-1]), inverse) @ gradient[j].reshape(-1)
            torch.testing.assert_close(found[j].reshape(-1), dense, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", ["wide", "sequence", "conv", "conv groups"])
def test_it_is_the_ridge_regression_of_the_output_gradients_on_the_inputs(case):
    case = CASES[case]()
    _, direction, _ = problems.update(case, fp.foof(damping=LAM))
    n = len(case.batch[0])
    for name, (a, g) in layer_rows(case).items():
        if name == "norm":
            continue
        for j in range(len(a)):
            x, rows = (r[j].flatten(0, 1) for r in (a, g))
            targets = rows * len(x) / n  # the loss is a mean over the examples
            mean = ridged(x)[0].trace() / x.shape[1]

            def objective(d, x=x, targets=targets, mean=mean):
                return (x @ d.T - targets).square().sum() / len(x) + LAM * mean * d.square().sum()

            d = matrix(direction, name, len(a))[j]
            slope = torch.func.grad(objective)(d)
            assert slope.abs().max() < 1e-10
            assert torch.func.grad(objective)(1.01 * d).abs().max() > 1e-6


def test_kfac_tends_to_it_where_the_damping_exceeds_the_output_factor():
    model = initialised(nn.Sequential(nn.Linear(6, 4)))
    inputs = normal((5, 6), 1)
    for scale, tolerance in ((1e-2, 1e-2), (1e-5, 1e-8)):
        problem = fp.problem(model, lambda f, y, s=scale: s * F.mse_loss(f, y))
        case = Toy(problem, ((inputs, normal((5, 4), 2)),))
        kfac = fp.kfac(damping=LAM**2, damping_split="equal", labels="empirical")
        a = layer_rows(case)["0"][0][0].flatten(0, 1)
        mean = (a.T @ a / len(a)).diagonal().mean()
        _, found, _ = problems.update(case, kfac)
        _, expected, _ = problems.update(case, fp.foof(damping=LAM / mean))
        assert_close({k: LAM * d for k, d in found.items()}, expected, rtol=tolerance)


def test_whitened_inputs_leave_the_gradient():
    inputs = torch.linalg.qr(normal((7, 4)))[0] * 7**0.5
    case = toy(nn.Linear(4, 3, bias=False), inputs, torch.arange(7) % 3)
    _, direction, evidence = problems.update(case, fp.foof(damping=LAM))
    assert_close(direction, {k: g / (1 + LAM) for k, g in evidence.grads.items()}, rtol=1e-12)


def test_one_layer_is_the_operator_of_its_name():
    case = toy(nn.Linear(4, 3), normal((7, 4)), torch.arange(7) % 3)
    operator = fp.KroneckerFactored(case.problem, case.params, case.batch, kind="foof")
    _, direction, evidence = problems.update(case, fp.foof(damping=LAM))
    mean = ridged(layer_rows_of(case))[0].trace() / 5
    assert_close(direction, operator.inverse(LAM * mean) @ evidence.grads, rtol=1e-9)


def layer_rows_of(case):
    x = case.batch[0]
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


def test_inputs_first_and_embeddings_are_solved_on_the_side_of_the_inputs():
    ids, targets = torch.tensor([[0, 3, 2], [2, 2, 0]]), torch.tensor([1, 0])
    params = {"table": normal((5, 3)), "inner": normal((3, 3), 1), "bias": normal((3,), 2)}

    def model(p, ids):
        return torch.addmm(p["bias"], F.embedding(ids, p["table"]).tanh().mean(1), p["inner"])

    problem = fp.problem(model, fp.losses.cross_entropy, params=params)
    case = Toy(problem, ((ids, targets),))
    state, direction, evidence = problems.update(case, fp.foof(damping=LAM))
    assert list(state.representation.left) == ["table", "inner+bias"]
    count = torch.bincount(ids.reshape(-1), minlength=5).double() / 6
    expected = evidence.grads["table"] / (count + LAM / 5).unsqueeze(1)
    assert_close(direction["table"], expected, rtol=1e-10)
    rows = F.embedding(ids, params["table"]).tanh().mean(1)
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    gradient = torch.cat([evidence.grads["inner"], evidence.grads["bias"].unsqueeze(0)])
    solved = torch.linalg.solve(ridged(rows)[1], gradient)
    assert_close(direction["inner"], solved[:-1], rtol=1e-9)
    assert_close(direction["bias"], solved[-1], rtol=1e-9)


@pytest.mark.parametrize("decay", [0.5, fp.RisingDecay(0.9), "sum"])
def test_each_layer_averages_the_batches_that_use_it(decay):
    """Two heads, of which a batch uses one."""
    params = {f"{k}.{p}": normal(s, i) for i, k in enumerate("ab")
              for p, s in (("weight", (3, 4)), ("bias", (3,)))}  # fmt: skip

    def model(p, inputs):
        x, head = inputs
        return F.linear(x, p[f"{head}.weight"], p[f"{head}.bias"])

    problem = fp.problem(model, fp.losses.cross_entropy, params=params)
    opt = fp.foof(damping=LAM, decay=decay)
    state, moments = opt.init(params), {"a": [], "b": []}
    for t, head in enumerate("abaab"):
        x = normal((6, 4), 20 + t)
        batch = ((x, head), torch.arange(6) % 3)
        rows = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        moments[head].append(rows.T @ rows / 6)
        evidence = fp.observe(problem, params, batch, opt.needs(t))
        state, direction = opt.update(state, evidence.grads, evidence)
        found = moments[head]
        if isinstance(decay, float):
            weights = [decay ** (len(found) - 1 - k) for k in range(len(found))]
            average = sum(w * m for w, m in zip(weights, found, strict=True)) / sum(weights)
        else:
            average = sum(found) / (1 if decay == "sum" else len(found))
        damped = average + LAM * average.trace() / 5 * reference.eye(5)
        expected = matrix(evidence.grads, head)[0] @ torch.linalg.inv(damped)
        torch.testing.assert_close(matrix(direction, head)[0], expected, rtol=1e-9, atol=1e-12)


def test_a_parameter_that_moves_to_another_layer_starts_anew():
    params = {"w": normal((3, 3)), "b": normal((3,), 1)}

    def model(p, inputs):
        x, biased = inputs
        return F.linear(x, p["w"], p["b"] if biased else None)

    problem = fp.problem(model, fp.losses.cross_entropy, params=params)
    opt = fp.foof(damping=LAM, refresh_every=100, start=0)
    state = opt.init(params)
    for t, biased in enumerate((True, False, True)):
        batch = ((normal((6, 3), t), biased), torch.arange(6) % 3)
        evidence = fp.observe(problem, params, batch, opt.needs(t))
        state, direction = opt.update(state, evidence.grads, evidence)
        assert state.representation.blocks == (("w+b",) if biased else ("w",))
        rows = layer_rows_of(Toy(problem, (batch[0],))) if biased else batch[0][0]
        gradient = evidence.grads["w"]
        if biased:
            gradient = torch.cat([gradient, evidence.grads["b"].unsqueeze(1)], 1)
        expected = gradient @ torch.linalg.inv(ridged(rows)[1])
        assert_close(direction["w"], expected[:, :3], rtol=1e-9)


def test_inputs_of_zero_leave_the_gradient_finite():
    case = toy(nn.Linear(4, 3, bias=False), 0 * normal((5, 4)), torch.arange(5) % 3)
    state, direction, _ = problems.update(case, fp.foof(), 2)
    assert finite((state, direction))
    assert_same(direction["weight"], torch.zeros(3, 4, dtype=torch.float64))


def test_no_output_gradients_but_the_losss_own_are_measured():
    opt = fp.foof()
    needs = [n for t in range(3) for n in opt.needs(t) if type(n) is not fp.Every]
    assert {(n.labels, n.others) for n in needs} == {("empirical", "none")}


@pytest.mark.parametrize("wrong", [{"damping": 0.0}, {"decay": 1.0}, {"every": 0}, {"start": -1}])
def test_wrong_options_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        fp.foof(**wrong)
