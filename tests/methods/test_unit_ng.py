"""Unit-wise natural gradient against blocks of dense Fisher matrices."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import funcprecond as fp
from funcprecond.layers import unit_moments
from funcprecond.representation import unit_blocks
from tests import problems, reference
from tests.equality import assert_close, assert_same
from tests.problems import Toy, initialised, labelled, normal
from tests.representation.test_gram import CASES, dense, toy
from tests.strategies import seeds

LAM = 0.07


def units_of(representation, params):
    """(indices of the entries of one unit, the bias last; whether it is one of a norm layer)."""
    start, where = 0, {}
    for name, p in params.items():
        where[name] = start + torch.arange(p.numel())
        start += p.numel()
    for part in ("rows", "columns", "scales"):
        for block, m in getattr(representation, part).items():
            weight, *bias = block.split("+")
            index = where[weight].reshape((-1, len(m)) if part == "columns" else (len(m), -1))
            index = index.mT if part == "columns" else index
            index = torch.cat([index, *(where[b].unsqueeze(1) for b in bias)], 1)
            for unit in index:
                yield unit, part == "scales" or not bias
    for name in representation.others:
        for i in where[name]:
            yield i.reshape(1), True


def expected(representation, params, matrix, gradient, quasi=False):
    found = gradient.clone()
    for unit, whole in units_of(representation, params):
        m = matrix[unit][:, unit] + LAM * reference.eye(len(unit))
        if not quasi:
            found[unit] = torch.linalg.solve(m, gradient[unit])
        elif whole and len(unit) > 2:
            found[unit] = gradient[unit] / m.diagonal()
        elif whole:
            found[unit] = torch.linalg.solve(m, gradient[unit])
        else:
            found[unit] = sparse_inverse(m) @ gradient[unit]
    return found


def sparse_inverse(m):
    """The inverse of the covariance that is m on its diagonal and in its last row and column, and
    in which all other entries depend on each other through the last alone (FANG3)."""
    regression = reference.eye(len(m))
    regression[:-1, -1] = -m[:-1, -1] / m[-1, -1]
    variances = torch.cat([m.diagonal()[:-1] - m[:-1, -1] ** 2 / m[-1, -1], m[-1, -1:]])
    return regression.T @ torch.diag(1 / variances) @ regression


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("quasi", [False, True])
def test_the_direction_is_the_dense_solve_of_each_unit(name, quasi):
    """Linear layers, convolutions, norm layers, embeddings, tied and shared weights."""
    case = CASES[name]()
    opt = fp.unit_ng(damping=LAM, labels="empirical", quasi_diagonal=quasi)
    state, direction, evidence = problems.update(case, opt)
    u = dense(case)
    kept = state.representation
    gradient = reference.ravel(evidence.grads)
    right = expected(kept, case.params, u.T @ u, gradient, quasi)
    torch.testing.assert_close(reference.ravel(direction), right, rtol=1e-9, atol=1e-11)


def test_the_units_are_those_of_the_layers():
    def kept(name):
        case = CASES[name]()
        state, _, _ = problems.update(case, fp.unit_ng(labels="empirical"))
        return state.representation

    assert {k: x.shape for k, x in kept("convnet").rows.items()} == {
        "0.weight+0.bias": (3, 9, 9),
        "4.weight+4.bias": (3, 13, 13),
    }
    assert kept("convnet").scales["1.weight+1.bias"].shape == (3, 2, 2)
    assert kept("conv2d groups").rows["0.weight+0.bias"].shape == (6, 7, 7)
    assert kept("matmul").columns["w"].shape == (4, 3, 3)
    assert kept("sequence").others["embed.weight"].shape == (5, 4)


@pytest.mark.parametrize("quasi", [False, True])
def test_exact_labels_give_the_blocks_of_the_gauss_newton_matrix(quasi):
    case = problems.convnet()
    opt = fp.unit_ng(damping=LAM, labels="exact", quasi_diagonal=quasi)
    state, direction, evidence = problems.update(case, opt)
    matrix = reference.ggn(case.problem, case.params, case.batch)
    gradient = reference.ravel(evidence.grads)
    right = expected(state.representation, case.params, matrix, gradient, quasi)
    torch.testing.assert_close(reference.ravel(direction), right, rtol=1e-8, atol=1e-10)


def test_sampled_labels_approach_the_exact_ones():
    case = problems.mlp()
    options = {"damping": LAM, "start": 0}
    once, again = (problems.update(case, fp.unit_ng(samples=400, **options))[1] for _ in range(2))
    assert_same(once, again)
    exact = reference.ravel(problems.update(case, fp.unit_ng(labels="exact", **options))[1])
    assert (reference.ravel(once) - exact).norm() < 0.1 * exact.norm()


def test_one_output_has_the_exact_fisher_matrix_of_its_layer():
    model = initialised(nn.Linear(4, 1))
    case = Toy(fp.problem(model, fp.losses.mse), ((normal((7, 4)), normal((7, 1), 1)),))
    _, direction, evidence = problems.update(case, fp.unit_ng(damping=LAM, labels="exact"))
    newton = reference.ggn(case.problem, case.params, case.batch) + LAM * reference.eye(5)
    right = torch.linalg.solve(newton, reference.ravel(evidence.grads))
    torch.testing.assert_close(reference.ravel(direction), right, rtol=1e-9, atol=1e-12)


def test_of_a_linear_layer_with_squared_error_all_units_have_one_block():
    """M_o = A c N, with c = 2 / (N o) of torch's mean."""
    model = initialised(nn.Linear(4, 3))
    x = normal((7, 4))
    case = Toy(fp.problem(model, fp.losses.mse), ((x, normal((7, 3), 1)),))
    state, _, _ = problems.update(case, fp.unit_ng(labels="exact", decay=None))
    rows = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    right = (rows.T @ rows * 2 / 21).expand(3, 5, 5)
    torch.testing.assert_close(state.representation.rows["weight+bias"], right)


@given(
    seeds, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.booleans()
)
def test_positions_are_summed_before_the_product(seed, n, positions, inputs, outputs, bias):
    """UNIT3; the sum over the positions of products is another matrix."""
    a, y = normal((n, positions, inputs), seed), normal((n, positions, outputs), seed + 1)
    model = initialised(nn.Linear(inputs, outputs, bias=bias), seed)
    case = Toy(fp.problem(model, fp.losses.MSE(reduction="sum")), ((a, y),))
    g = 2 * (model(a) - y).detach()
    rows = torch.cat([a, torch.ones_like(a[..., :1])], -1) if bias else a
    p = torch.einsum("nto,nti->noi", g, rows)
    blocks = torch.einsum("noi,noj->oij", p, p) / 2  # the terms are half squares, and c = 2
    for quasi in (False, True):
        opt = fp.unit_ng(labels="empirical", decay=None, quasi_diagonal=quasi)
        (found,) = problems.update(case, opt)[0].representation.rows.values()
        right = blocks
        if quasi:
            right = torch.stack([blocks.diagonal(dim1=1, dim2=2), blocks[:, -1]][: 1 + bias], 1)
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 30, 100])
def test_blocks_are_computed_for_a_few_units_at_a_time(chunk, monkeypatch):
    case = CASES["conv2d groups"]()
    opt = fp.unit_ng(labels="empirical")
    _, whole, _ = problems.update(case, opt)
    monkeypatch.setattr(unit_moments, "CHUNK", chunk)
    assert_close(problems.update(case, opt)[1], whole, rtol=1e-12)


def test_a_layer_norm_sums_the_tokens_of_an_example_first():
    """UNIT4 to UNIT7."""
    case = toy(
        nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)), normal((5, 3, 4)), torch.zeros(5, 3).long()
    )
    state, direction, evidence = problems.update(case, fp.unit_ng(damping=LAM, labels="empirical"))
    x = F.layer_norm(case.batch[0], (4,))
    head = torch.softmax(case.problem(case.params, case.batch[0]), -1)
    head[..., 0] -= 1
    g = head @ case.params["1.weight"] / 3  # each token's term is one of three of its example
    w, b = (g * x).sum(1), g.sum(1)
    f11, f12, f22 = (w * w).mean(0), (w * b).mean(0), (b * b).mean(0)
    block = torch.stack([torch.stack([f11, f12], -1), torch.stack([f12, f22], -1)], -2)
    torch.testing.assert_close(state.representation.averages()[2]["0.weight+0.bias"] / 3, block)
    tokens = torch.einsum("ntu,ntu->u", g * x, g * x) / 5
    assert (tokens - f11).norm() > 0.01 * f11.norm()
    gw, gb = evidence.grads["0.weight"], evidence.grads["0.bias"]
    f11, f12, f22 = 3 * f11 + LAM, 3 * f12, 3 * f22 + LAM
    determinant = f11 * f22 - f12**2
    assert_close(direction["0.weight"], (f22 * gw - f12 * gb) / determinant, rtol=1e-9)
    assert_close(direction["0.bias"], (f11 * gb - f12 * gw) / determinant, rtol=1e-9)


def test_a_batch_norm_in_training_has_the_shares_of_the_examples():
    """UNIT8: their sum is the gradient."""
    model = initialised(
        nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3))
    )
    inputs = normal((4, 2, 3, 3))
    case = Toy(fp.problem(model, fp.losses.cross_entropy), ((inputs, torch.arange(4) % 3),))
    opt = fp.unit_ng(labels="empirical", decay=None)
    state, _, evidence = problems.update(case, opt)
    z = model[0](inputs)
    x = F.batch_norm(z, None, None, training=True).detach()
    scale, shift = (case.params[f"1.{k}"].reshape(1, 3, 1, 1) for k in ("weight", "bias"))
    out = (x * scale + shift).requires_grad_()
    loss = F.cross_entropy(model[3](out.flatten(1)), torch.arange(4) % 3, reduction="sum")
    (g,) = torch.autograd.grad(loss, out)
    p = torch.stack([(g * x).sum((2, 3)), g.sum((2, 3))], -1)
    blocks = torch.einsum("nup,nuq->upq", p, p) / 4
    torch.testing.assert_close(state.representation.scales["1.weight+1.bias"], blocks)
    assert_close(p.mean(0)[:, 0], evidence.grads["1.weight"], rtol=1e-9)


def test_the_blocks_are_averaged_and_inverted_at_intervals():
    case = problems.mlp()
    opt = fp.unit_ng(damping=LAM, labels="empirical", decay=0.5, every=2, refresh_every=4, start=0)
    state, states = opt.init(case.params), []
    for t in range(5):
        evidence = fp.observe(case.problem, case.params, case.at(t), opt.needs(t))
        state, direction = opt.update(state, evidence.grads, evidence)
        states.append(state)
    matrices = [dense(Toy(case.problem, (case.at(t),))) for t in (0, 2, 4)]
    weights = [1 / 7, 2 / 7, 4 / 7]
    matrix = sum(w * u.T @ u for w, u in zip(weights, matrices, strict=True))
    gradient = reference.ravel(evidence.grads)
    right = expected(state.representation, case.params, matrix, gradient)
    torch.testing.assert_close(reference.ravel(direction), right, rtol=1e-9, atol=1e-11)
    assert states[1].representation is states[0].representation
    assert all(s.factor is states[0].factor for s in states[1:4])


def test_the_quasi_diagonal_step_does_not_depend_on_the_means_of_the_inputs():
    """Shifted inputs with a shifted bias are the same model; both steps change it alike."""
    x, shift = normal((9, 4)), normal((4,), 3)
    weight, bias = normal((3, 4), 1), normal((3,), 2)
    changes = []
    for s in (torch.zeros(4).double(), shift):
        params = {"w": weight, "b": bias - weight @ s}
        problem = fp.problem(lambda p, x: F.linear(x, p["w"], p["b"]), fp.losses.mse, params=params)
        case = Toy(problem, ((x + s, normal((9, 3), 4)),))
        opt = fp.unit_ng(damping=1e-10, labels="exact", quasi_diagonal=True)
        _, direction, _ = problems.update(case, opt)
        changes.append(F.linear(x + s, direction["w"], direction["b"]))
    torch.testing.assert_close(*changes, rtol=1e-6, atol=1e-8)


def test_blocks_that_would_be_too_large_are_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(unit_blocks, "MAX_ENTRIES", 100)
    case = toy(nn.Linear(6, 3), *labelled(4, 6, 3, 0))
    opt = fp.unit_ng(labels="empirical")
    with pytest.raises(ValueError, match=r"'weight\+bias' .* \(3, 7, 7\).*quasi_diagonal=True"):
        problems.update(case, opt)
    problems.update(case, fp.unit_ng(labels="empirical", quasi_diagonal=True))


@pytest.mark.parametrize(
    "wrong", [{"damping": 0.0}, {"labels": "all"}, {"samples": 0}, {"decay": 1.0}]
)
def test_wrong_options_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        fp.unit_ng(**wrong)
