import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn

import funcprecond as fp
from funcprecond.curvature.hessian import HessianOperator, HessianProbes
from tests import problems, reference, strategies
from tests.equality import assert_close, assert_same
from tests.problems import initialised, normal, seeded


def loss_of(toy):
    return lambda p: toy.problem.loss(toy.problem(p, toy.batch[0]), toy.batch[1])


def dense(toy):
    return reference.hessian(loss_of(toy), toy.params)


@given(strategies.vectors(), strategies.seeds)
def test_hvp_of_a_known_function_is_its_hessian(x, seed):
    """``sum a sin(x)`` plus the square of the sum: the Hessian is -diag(a sin(x)) + 2."""
    a = {k: normal(v.shape, seed + i) for i, (k, v) in enumerate(x.items())}
    v = {k: normal(t.shape, seed + 9 + i) for i, (k, t) in enumerate(x.items())}

    def f(p):
        total = sum(t.sum() for t in p.values())
        return sum((a[k] * torch.sin(p[k])).sum() for k in p) + total**2

    total = sum(t.sum() for t in v.values())
    expected = {k: -a[k] * torch.sin(x[k]) * v[k] + 2 * total for k in x}
    assert_close(fp.hvp(f, x, v), expected, rtol=1e-9, atol=1e-10)


def test_hvp_is_the_dense_hessian_and_it_is_that_of_differences():
    toy = problems.mlp()
    f, v = loss_of(toy), normal((31,), 3)
    product = reference.ravel(fp.hvp(f, toy.params, reference.unravel(v, toy.params)))
    assert_close(product, dense(toy) @ v, rtol=1e-11)
    gradient = torch.func.grad(f)
    rows = [
        reference.ravel(
            reference.difference(gradient, toy.params, reference.unravel(e, toy.params))
        )
        for e in reference.eye(31)
    ]
    assert_close(torch.stack(rows), dense(toy), rtol=1e-7)


def test_the_operator_is_the_dense_hessian():
    toy, v = problems.mlp(), normal((31,), 3)
    operator = fp.observe(toy.problem, toy.params, toy.batch, (HessianOperator(),))[
        HessianOperator()
    ]
    product = reference.ravel(operator(reference.unravel(v, toy.params)))
    assert_close(product, dense(toy) @ v, rtol=1e-11)


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_probes_carry_vectors_and_their_products(distribution):
    toy, need = problems.mlp(), HessianProbes(3, distribution)
    probes = fp.observe(toy.problem, toy.params, toy.batch, (need,), generator=seeded(0))[need]
    v = torch.cat([x.reshape(3, -1) for x in probes.vectors.values()], 1)
    products = torch.cat([x.reshape(3, -1) for x in probes.products.values()], 1)
    assert_close(products, v @ dense(toy), rtol=1e-10)
    assert_close(reference.ravel(probes.diagonal()), (v * (v @ dense(toy))).mean(0), rtol=1e-10)
    assert (v.abs() == 1).all() == (distribution == "rademacher")


def test_the_probes_diagonal_is_the_hessians_in_the_mean():
    toy, need = problems.mlp(), HessianProbes(2000)
    probes = fp.observe(toy.problem, toy.params, toy.batch, (need,), generator=seeded(0))[need]
    h = dense(toy)
    error = reference.ravel(probes.diagonal()) - h.diagonal()
    # The variance of one Rademacher probe is the squared off-diagonal of its row.
    deviation = ((h.square().sum(1) - h.diagonal().square()) / 2000).sqrt()
    assert (error.abs() < 5 * deviation + 1e-12).all()


def test_on_a_diagonal_hessian_one_rademacher_probe_is_exact():
    params = {"w": normal((4,))}
    problem = fp.problem(lambda p, x: x * p["w"] ** 2, lambda f, y: f.sum(), params=params)
    need = HessianProbes(1)
    batch = (torch.ones(1, 4, dtype=torch.float64), None)
    probes = fp.observe(problem, params, batch, (need,), generator=seeded(0))[need]
    assert_close(probes.diagonal()["w"], torch.full((4,), 2.0, dtype=torch.float64), rtol=1e-13)


@pytest.mark.parametrize("options", [{"n": 0}, {"distribution": "uniform"}])
def test_probes_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="at least 1 and distribution"):
        HessianProbes(**options)


def test_a_second_probe_does_not_change_the_first():
    toy = problems.mlp()
    vectors = [
        HessianProbes(n).draw(toy.problem, toy.params, toy.batch, seeded(0))["0.weight"][0]
        for n in (1, 1)
    ]
    assert_same(vectors[0], vectors[1])


def penalised(layer):
    """A penalty on the gradient in the inputs, whose Hessian takes a layer's third derivative."""
    x = normal((3, 4), 1).requires_grad_()

    def penalty(p):
        h = layer(torch.nn.functional.linear(x, p["w"]))
        return torch.autograd.grad(h.pow(3).sum(), x, create_graph=True)[0].square().sum()

    return penalty


def test_a_function_may_take_derivatives_of_its_own():
    penalty = penalised(torch.nn.functional.gelu)

    def gradient(p):
        w = p["w"].detach().requires_grad_()
        return {"w": torch.autograd.grad(penalty({"w": w}), w)[0]}

    w, v = {"w": normal((4, 4), 2)}, {"w": normal((4, 4), 3)}
    assert_close(fp.hvp(penalty, w, v), reference.difference(gradient, w, v), rtol=1e-6)


def test_a_third_derivative_that_torch_gets_wrong_is_refused():
    penalty = penalised(lambda h: torch.nn.functional.layer_norm(h, (4,)))
    with pytest.raises(NotImplementedError, match="layer norm .* a third time"):
        fp.hvp(penalty, {"w": normal((4, 4), 2)}, {"w": normal((4, 4), 3)})


@pytest.mark.parametrize("causal", [False, True])
def test_a_function_with_the_default_kernel_of_attention_is_differentiated_twice(causal):
    params = {k: normal((2, 2, 5, 4), i) for i, k in enumerate("qkv")}

    def f(p):
        return F.scaled_dot_product_attention(p["q"], p["k"], p["v"], is_causal=causal).pow(3).sum()

    def by_hand(p):
        scores = p["q"] @ p["k"].mT / 2
        if causal:
            scores = scores.masked_fill(~torch.ones(5, 5).bool().tril(), -torch.inf)
        return (scores.softmax(-1) @ p["v"]).pow(3).sum()

    vectors = {k: normal((3, *p.shape), 5) for k, p in params.items()}
    one = {k: v[0] for k, v in vectors.items()}
    slope = torch.func.grad(by_hand)
    expected = reference.difference(slope, params, one)
    assert_close(fp.hvp(f, params, one), expected, rtol=1e-7)
    many = torch.vmap(lambda v: fp.hvp(f, params, v))(vectors)
    assert_close({k: v[0] for k, v in many.items()}, expected, rtol=1e-7)


def test_attention_inside_of_a_layer_is_differentiated_twice_in_a_function():
    module = initialised(nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True))
    x = normal((3, 5, 4), 1)
    params = {k: p.detach() for k, p in module.named_parameters()}

    def f(p):
        return torch.func.functional_call(module, p, x).pow(3).sum()

    def slope(p):
        leaves = {k: x.clone().requires_grad_() for k, x in p.items()}
        return dict(zip(p, torch.autograd.grad(f(leaves), [*leaves.values()]), strict=True))

    vector = {k: normal(p.shape, 2) for k, p in params.items()}
    expected = reference.difference(slope, params, vector)
    assert_close(fp.hvp(f, params, vector), expected, rtol=1e-6)
