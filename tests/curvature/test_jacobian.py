import pytest
import torch

import funcprecond as fp
from funcprecond.linalg import treemath
from tests import problems, reference
from tests.autodiff.test_op_table import MODELS, build
from tests.equality import assert_close
from tests.problems import normal, seeded


@pytest.mark.parametrize("model", MODELS)
def test_one_shot_products_in_forward_mode_are_the_kept_ones_and_those_of_differences(model):
    problem, batch = build(model)
    v = {k: normal(p.shape, i) for i, (k, p) in enumerate(problem.params.items())}
    kept = fp.linearize(problem, problem.params, batch, generator=seeded(3))
    pushed = fp.jvp(problem, problem.params, batch, v, generator=seeded(3))
    assert_close(pushed, kept.jvp(v), rtol=1e-9)

    def outputs(p):
        return fp.Evaluation(problem, p, batch, masks=kept.masks).outputs

    assert_close(pushed, reference.difference(outputs, problem.params, v), rtol=1e-6)
    once = fp.ggn_mv(problem, problem.params, batch, v, generator=seeded(3))
    assert_close(reference.ravel(once), reference.ravel(kept.ggn_mv(v)), rtol=1e-9)
    u = normal(pushed.shape, 5)
    pulled = fp.vjp(problem, problem.params, batch, u, generator=seeded(3))
    assert_close(treemath.dot(pulled, v), (u * pushed).sum(), rtol=1e-9)


def test_outputs_may_be_a_tree():
    params = {"w": normal((3,))}
    model = lambda p, x: {"a": x * p["w"], "b": (x.sin() * p["w"].sum(),)}  # noqa: E731
    problem = fp.problem(model, lambda f, y: f["a"].sum() + f["b"][0].sum(), params=params)
    batch, v = (normal((2, 3), 1), None), {"w": normal((3,), 2)}
    pushed = fp.jvp(problem, params, batch, v)
    expected = {"a": batch[0] * v["w"], "b": (batch[0].sin() * v["w"].sum(),)}
    assert_close(pushed, expected, rtol=1e-12)
    assert_close(fp.linearize(problem, params, batch).jvp(v), expected, rtol=1e-12)


def test_an_operation_without_a_forward_rule_falls_back():
    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx, g):
            return g * ctx.saved_tensors[0].cos()

    toy = problems.mlp()

    def model(p, x):
        return Odd.apply(torch.nn.functional.linear(x, p["0.weight"], p["0.bias"]))

    params = {k: toy.params[k] for k in ("0.weight", "0.bias")}
    problem = fp.problem(model, fp.losses.mse, params=params)
    batch = (toy.batch[0], normal((5, 4), 3))
    smooth = fp.problem(
        lambda p, x: torch.nn.functional.linear(x, p["0.weight"], p["0.bias"]).sin(),
        fp.losses.mse,
        params=params,
    )
    v = {k: normal(p.shape, 1) for k, p in params.items()}
    assert_close(
        fp.ggn_mv(problem, params, batch, v), fp.ggn_mv(smooth, params, batch, v), rtol=1e-12
    )


def test_they_work_under_vmap_and_grad():
    toy = problems.mlp()
    v = {k: normal((2, *p.shape), i) for i, (k, p) in enumerate(toy.params.items())}
    one = lambda u: fp.jvp(toy.problem, toy.params, toy.batch, u)  # noqa: E731
    mapped = torch.vmap(one)(v)
    assert_close(mapped[1], one({k: x[1] for k, x in v.items()}), rtol=1e-11)
    first = {k: x[0] for k, x in v.items()}
    size = lambda p: fp.jvp(toy.problem, p, toy.batch, first).square().sum()  # noqa: E731
    slope = treemath.dot(torch.func.grad(size)(toy.params), first)
    assert slope.item() == pytest.approx(
        reference.difference(size, toy.params, first).item(), rel=1e-6
    )
