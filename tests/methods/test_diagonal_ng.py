"""Diagonal natural gradient against the diagonals of dense Fisher matrices."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcprecond as fp
from tests import problems, reference
from tests.equality import assert_close
from tests.problems import Toy, initialised, normal
from tests.representation.test_gram import CASES, dense

LAM = 0.07


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_the_direction_is_divided_by_the_dense_diagonal(name, power):
    """Linear layers, convolutions, norm layers, embeddings, tied and shared weights, any others."""
    case = CASES[name]()
    opt = fp.diagonal_ng(damping=LAM, labels="empirical", power=power)
    _, direction, evidence = problems.update(case, opt)
    s = dense(case).square().sum(0)
    right = reference.ravel(evidence.grads) / (s**power + LAM)
    torch.testing.assert_close(reference.ravel(direction), right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("make", [problems.mlp, problems.convnet, problems.regression])
def test_exact_labels_give_the_diagonal_of_the_gauss_newton_matrix(make):
    case = make()
    _, direction, evidence = problems.update(case, fp.diagonal_ng(damping=LAM, labels="exact"))
    s = reference.ggn(case.problem, case.params, case.batch).diagonal()
    right = reference.ravel(evidence.grads) / (s + LAM)
    torch.testing.assert_close(reference.ravel(direction), right, rtol=1e-8, atol=1e-10)


def test_sampled_labels_approach_the_exact_ones():
    case = problems.mlp()
    found = problems.update(case, fp.diagonal_ng(damping=LAM, samples=400))[1]
    exact = reference.ravel(problems.update(case, fp.diagonal_ng(damping=LAM, labels="exact"))[1])
    assert (reference.ravel(found) - exact).norm() < 0.1 * exact.norm()


def test_positions_are_summed_before_the_square():
    """DIAG1 for one position; DIAG2: for several the product of squares is another matrix."""
    for positions in (1, 3):
        a, y = normal((5, positions, 4)), normal((5, positions, 2), 1)
        model = initialised(nn.Linear(4, 2, bias=False))
        case = Toy(fp.problem(model, fp.losses.MSE(reduction="sum")), ((a, y),))
        g = 2 * (model(a) - y).detach()
        opt = fp.diagonal_ng(labels="empirical", decay=None)
        state, _, _ = problems.update(case, opt)
        found = state.representation.diagonal()["weight"]
        rows = torch.einsum("nto,nti->noi", g, a)
        torch.testing.assert_close(found, rows.square().sum(0) / 2)
        shortcut = torch.einsum("nto,nti->oi", g.square(), a.square()) / 2
        assert ((found - shortcut).norm() > 0.01 * found.norm()) == (positions > 1)


@pytest.mark.parametrize("decay", [0.5, "sum", None])
def test_the_diagonals_of_the_steps_are_averaged_at_an_interval(decay):
    case = problems.mlp()
    opt = fp.diagonal_ng(damping=LAM, labels="empirical", decay=decay, every=2)
    _, direction, evidence = problems.update(case, opt, 5)
    squares = [dense(Toy(case.problem, (case.at(t),))).square().sum(0) for t in (0, 2, 4)]
    weights = {0.5: [1 / 7, 2 / 7, 4 / 7], "sum": [1, 1, 1], None: [0, 0, 1]}[decay]
    s = sum(w * x for w, x in zip(weights, squares, strict=True))
    right = reference.ravel(evidence.grads) / (s + LAM)
    torch.testing.assert_close(reference.ravel(direction), right, rtol=1e-9, atol=1e-11)


def test_each_parameter_averages_the_batches_that_use_it():
    """Two heads, of which a batch uses one; the other keeps its diagonal."""
    params = {"a": normal((3, 4)), "b": normal((3, 4), 1)}
    problem = fp.problem(
        lambda p, inputs: F.linear(inputs[0], p[inputs[1]]), fp.losses.cross_entropy, params=params
    )
    opt = fp.diagonal_ng(damping=LAM, labels="empirical", decay=0.5)
    state, seen = opt.init(params), {"a": [], "b": []}
    for t, head in enumerate("abaab"):
        x, y = normal((6, 4), 20 + t), torch.arange(6) % 3
        evidence = fp.observe(problem, params, ((x, head), y), opt.needs(t))
        state, direction = opt.update(state, evidence.grads, evidence)
        g = torch.softmax(x @ params[head].T, 1) - F.one_hot(y, 3)
        seen[head].append((g.square().T @ x.square()) / 6)
        found = seen[head]
        weights = [0.5 ** (len(found) - 1 - k) for k in range(len(found))]
        s = sum(w * d for w, d in zip(weights, found, strict=True)) / sum(weights)
        assert_close(direction[head], evidence.grads[head] / (s + LAM), rtol=1e-9)


@pytest.mark.parametrize(
    "wrong", [{"damping": 0.0}, {"labels": "all"}, {"samples": 0}, {"power": -1.0}]
)
def test_wrong_options_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        fp.diagonal_ng(**wrong)
