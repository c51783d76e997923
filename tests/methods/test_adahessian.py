"""AdaHessian against its formula, exact Hessians and Adam."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcprecond as fp
from funcprecond.curvature.hessian import HessianProbes, Probes
from funcprecond.linalg.block_mean import block_mean
from tests import reference
from tests.equality import assert_close, assert_same
from tests.problems import convnet, mlp, normal, seeded, update
from tests.strategies import seeds, shapes


def quadratic(matrix):
    """``x^T A x / 2`` for a symmetric matrix, with a batch that only has a length."""

    def model(params, inputs):
        return (params["x"] @ matrix @ params["x"] / 2).expand(len(inputs))

    params = {"x": normal((len(matrix),), 1)}
    return fp.problem(model, lambda outputs, targets: outputs.mean(), params=params)


BATCH = (torch.zeros(2), torch.zeros(2))


def observed(problem, opt, params=None, t=0, seed=0):
    params = problem.params if params is None else params
    return fp.observe(problem, params, BATCH, opt.needs(t), generator=seeded(seed))


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_a_diagonal_hessian_is_measured_exactly(power, seed):
    h = torch.tensor([3.0, -0.5, 1e-3, 0.0], dtype=torch.float64)
    problem = quadratic(torch.diag(h))
    opt = fp.adahessian(power=power, damping=1e-2)
    evidence = observed(problem, opt, seed=seed)
    state, d = opt.update(opt.init(problem.params), evidence.grads, evidence)
    # Between the weight 0.999 as a double and 1 - 0.999 stand a dozen digits.
    torch.testing.assert_close(
        d["x"], evidence.grads["x"] / (h.abs() ** power + 1e-2), rtol=1e-11, atol=1e-13
    )
    torch.testing.assert_close(state.second_moment["x"], (1 - 0.999) * h**2)


def test_all_signs_together_give_the_diagonal_and_never_less_in_absolute_value():
    matrix = normal((5, 5), 3)
    matrix = matrix + matrix.T
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=5)), dtype=torch.float64)
    products = signs @ matrix
    probes = Probes({"x": signs}, {"x": products})
    torch.testing.assert_close(probes.diagonal()["x"], matrix.diag())
    assert ((signs * products).abs().mean(0) >= matrix.diag().abs()).all()


def stub(opt, grads, products, t=0):
    """Evidence with these products of the Hessian, for probes of ones."""
    ones = {k: torch.ones_like(g).unsqueeze(0) for k, g in grads.items()}
    values = Probes(ones, {k: p.unsqueeze(0) for k, p in products.items()})
    measured = {n: values if isinstance(n, HessianProbes) else () for n in opt.needs(t)}
    loss = torch.zeros(())
    return fp.Evidence(grads, loss, loss, grads, {}, measured)


@given(shapes, seeds)
def test_with_the_gradient_as_diagonal_it_is_adam(shapes, seed):
    opt = fp.adahessian(damping=1e-8, block={}, betas=(0.8, 0.99))
    p = {k: normal(shape, seed) for k, shape in shapes.items()}
    theirs = {k: torch.nn.Parameter(x.clone()) for k, x in p.items()}
    adam = torch.optim.Adam(theirs.values(), lr=0.1, betas=(0.8, 0.99), eps=1e-8)
    state = opt.init(p)
    for t in range(4):
        g = {k: normal(x.shape, seed + 7 * t + i) for i, (k, x) in enumerate(p.items())}
        for k, x in theirs.items():
            x.grad = g[k].clone()
        adam.step()
        state, d = opt.update(state, g, stub(opt, g, g, t))
        p = fp.apply(p, {k: 0.1 * x for k, x in d.items()})
        assert_close(p, {k: x.detach() for k, x in theirs.items()}, atol=1e-12)


def test_equals_the_formula_over_steps_with_an_interval():
    h = normal((4, 4), 5)
    h = h @ h.T
    problem = quadratic(h)
    opt = fp.adahessian(every=3, samples=2, damping=1e-3, power=0.7, betas=(0.5, 0.8))
    params, state = problem.params, opt.init(problem.params)
    m = v = torch.zeros(4, dtype=torch.float64)
    measured = 0
    for t in range(8):
        evidence = observed(problem, opt, params, t, seed=t)
        assert (HessianProbes(2) in opt.needs(t)) == (t % 3 == 0)
        if t % 3 == 0:
            probes = evidence[HessianProbes(2)]
            z = probes.vectors["x"]
            v = 0.8 * v + 0.2 * (z * (z @ h)).mean(0) ** 2
            measured += 1
        g = h @ params["x"]
        m = 0.5 * m + 0.5 * g
        expected = (m / (1 - 0.5 ** (t + 1))) / ((v / (1 - 0.8**measured)) ** 0.35 + 1e-3)
        state, d = opt.update(state, evidence.grads, evidence)
        torch.testing.assert_close(d["x"], expected, rtol=1e-11, atol=1e-13)
        params = fp.apply(params, {"x": 0.1 * d["x"]})
    assert int(state.step) == 8
    assert int(state.measured) == 3


@pytest.mark.parametrize("average", ["abs", "signed"])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 2, 2), (2, 1, 2, 2, 3)])
def test_convolutions_share_one_number_a_kernel(shape, average):
    opt = fp.adahessian(average=average, betas=(0.0, 0.0))
    g, h = {"w": normal(shape, 1)}, {"w": normal(shape, 2)}
    state, _ = opt.update(opt.init(g), g, stub(opt, g, h))
    values = h["w"].abs() if average == "abs" else h["w"]
    mean = values.flatten(2).mean(2)
    found = state.second_moment["w"].flatten(2)
    torch.testing.assert_close(found, (mean**2).unsqueeze(2).expand_as(found))


def test_vectors_and_matrices_are_not_averaged_unless_asked():
    d = normal((3, 5), 1)
    assert torch.equal(block_mean(d, None), d)
    torch.testing.assert_close(block_mean(d, "row"), d.mean(1, keepdim=True).expand(3, 5))
    assert torch.equal(block_mean(d[0], "row"), d[0])
    assert torch.equal(block_mean(d[0, 0], "kernel"), d[0, 0])


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 6), seeds)
def test_blocks_stay_inside_rows_and_the_last_may_be_short(rows, length, size, seed):
    d = normal((rows, length), seed)
    found = block_mean(d, size)
    for r, j in itertools.product(range(rows), range(length)):
        first = j // size * size
        expected = d[r, first : first + size].mean()
        torch.testing.assert_close(found[r, j], expected)
    torch.testing.assert_close(block_mean(d[0], size), found[0])


def test_a_network_is_preconditioned_by_its_own_hessian():
    toy = mlp()
    x, y = toy.batch
    h = reference.hessian(lambda p: toy.problem.loss(toy.problem(p, x), y), toy.params)
    opt = fp.adahessian(damping=1e-3)
    _, direction, evidence = update(toy, opt)
    z = reference.ravel({k: v[0] for k, v in evidence[HessianProbes(1)].vectors.items()})
    expected = reference.ravel(evidence.grads) / ((h @ z).abs() + 1e-3)
    torch.testing.assert_close(reference.ravel(direction), expected, rtol=1e-8, atol=1e-10)


def test_a_subset_of_the_parameters_has_its_own_entries():
    toy = convnet()
    rules = [("0.*", "a"), ("*", "b")]
    split = fp.partition(rules, a=fp.adahessian(), b=fp.adahessian())
    assert_same(update(toy, split, 2)[1], update(toy, fp.adahessian(), 2)[1])


def test_it_says_what_is_missing_or_wrong():
    opt = fp.adahessian()
    g = {"x": torch.ones(2)}
    with pytest.raises(fp.MissingEvidence, match="HessianProbes"):
        opt.update(opt.init(g), g)
    for options, match in (
        ({"average": "mean"}, "average"),
        ({"block": {2: "rows"}}, "block"),
        ({"block": {2: 0}}, "block"),
        ({"every": 0}, "interval"),
        ({"samples": 0}, "samples must be"),
    ):
        with pytest.raises(ValueError, match=match):
            fp.adahessian(**options)
