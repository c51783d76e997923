"""The dense natural gradients, against Fisher matrices by other routes."""

import pytest
import torch
from torch import nn

import funcprecond as fp
from tests import reference
from tests.equality import assert_close, assert_same
from tests.methods.test_seng import by_parameter
from tests.problems import Toy, convnet, initialised, mlp, normal, regression, train, update
from tests.representation.test_gram import CASES, dense

LAM = 0.07


def solved(matrix, grads):
    x = torch.linalg.solve(matrix + LAM * reference.eye(len(matrix)), reference.ravel(grads))
    return reference.unravel(x, grads)


def by_layer(matrix, params):
    """The matrix without the blocks of two layers: parameters whose names begin alike belong."""
    owner = torch.cat(
        [
            torch.full((p.numel(),), i)
            for i, layer in enumerate(dict.fromkeys(k.split(".")[0] for k in params))
            for k, p in params.items()
            if k.split(".")[0] == layer
        ]
    )
    return matrix * (owner[:, None] == owner[None, :])


@pytest.mark.parametrize("make", [mlp, convnet, regression])
def test_the_direction_is_the_dense_solve_with_the_exact_fisher_matrix(make):
    toy = make()
    fisher = reference.ggn(toy.problem, toy.params, toy.batch)
    _, found, evidence = update(toy, fp.natural_gradient(damping=LAM))
    assert_close(found, solved(fisher, evidence.grads), rtol=1e-8)
    _, found, _ = update(toy, fp.layerwise_ng(damping=LAM))
    assert_close(found, solved(by_layer(fisher, toy.params), evidence.grads), rtol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_empirical_rows_of_all_layers(name):
    case = CASES[name]()
    u = dense(case)
    options = {"damping": LAM, "labels": "empirical", "decay": None}
    _, found, evidence = update(case, fp.natural_gradient(**options))
    assert_close(found, solved(u.T @ u, evidence.grads), rtol=1e-8)
    state, found, _ = update(case, fp.layerwise_ng(**options))
    own = by_parameter(u, case.params)
    for block in state.representation.blocks:
        names = block.split("+")
        x = torch.cat([own[k] for k in names], 1)
        expected = solved(x.T @ x, {k: evidence.grads[k] for k in names})
        assert_close({k: found[k] for k in names}, expected, rtol=1e-8)


def test_sampled_labels_approach_the_exact_ones():
    toy = mlp()
    exact = reference.ravel(update(toy, fp.natural_gradient(damping=LAM))[1])
    for samples, error in ((1, 2.0), (1000, 0.06)):
        opt = fp.natural_gradient(damping=LAM, labels="mc", samples=samples)
        found = reference.ravel(update(toy, opt)[1])
        assert 1e-4 * exact.norm() < (found - exact).norm() < error * exact.norm()


@pytest.mark.parametrize("decay", [None, 0.5, "sum", fp.RisingDecay(0.9)])
@pytest.mark.parametrize("method", [fp.natural_gradient, fp.layerwise_ng])
def test_the_matrix_is_averaged_over_the_steps(method, decay):
    toy, steps = mlp(), 4
    matrices = [reference.ggn(toy.problem, toy.params, toy.at(t)) for t in range(steps)]
    total, weight = 0.0, 0.0
    for k, x in enumerate(matrices, 1):
        old = min(1 - 1 / k, 0.9) if isinstance(decay, fp.RisingDecay) else decay or 0.0
        old, new = (1.0, 1.0) if decay == "sum" else (old, 1 - old)
        total, weight = old * total + new * x, old * weight + new
    matrix = total if decay == "sum" else total / weight
    if method is fp.layerwise_ng:
        matrix = by_layer(matrix, toy.params)
    _, found, evidence = update(toy, method(damping=LAM, decay=decay), steps)
    assert_close(found, solved(matrix, evidence.grads), rtol=1e-8)


@pytest.mark.parametrize("method", [fp.natural_gradient, fp.layerwise_ng])
def test_a_saved_state_loads_into_its_own_model_only(method):
    toy, opt = mlp(), method(every=2, refresh_every=4)
    state = train(toy, opt, 3)[1]
    assert_same(fp.from_dict(opt.init(toy.params), fp.to_dict(state)), state)
    other = dict(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).named_parameters())
    with pytest.raises(ValueError, match=r"saved matrix of '(all|0.weight\+0.bias)'"):
        fp.from_dict(opt.init(other), fp.to_dict(state))


def test_large_networks_are_refused_before_any_work():
    params = {"w": torch.zeros(70, 60)}
    with pytest.raises(ValueError, match="would have 4200 rows, and the limit is 4096"):
        fp.natural_gradient().init(params)
    model = initialised(nn.Linear(64, 65))
    toy = Toy(fp.problem(model, fp.losses.mse), ((normal((2, 64)), normal((2, 65))),))
    with pytest.raises(ValueError, match=r"\['weight', 'bias'\] would have 4225 rows"):
        update(toy, fp.layerwise_ng(labels="empirical"))


def test_float32_keeps_float32_and_learns():
    toy = Toy(mlp(torch.float32).problem, mlp(torch.float32).batches[:1])
    for method in (fp.natural_gradient, fp.layerwise_ng):
        opt = fp.chain(method(damping=0.1), fp.scale(0.2))
        params, _, evidence = train(toy, opt, 60)
        assert {x.dtype for x in params.values()} == {torch.float32}
        assert evidence.loss < 0.5 * update(toy, opt)[2].loss


def test_it_says_what_is_missing_or_wrong():
    for method in (fp.natural_gradient, fp.layerwise_ng):
        opt, g = method(), {"x": torch.ones(2)}
        with pytest.raises(fp.MissingEvidence, match="ExampleRows"):
            opt.update(opt.init(g), g)
        for options, match in (
            ({"damping": 0.0}, "positive"),
            ({"labels": "all"}, "labels"),
            ({"samples": 0}, "samples"),
            ({"decay": 1.0}, "decay"),
        ):
            with pytest.raises(ValueError, match=match):
                method(**options)
