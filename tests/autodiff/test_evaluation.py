"""One batch at one point, by both routes: an autograd graph of its own, and torch.func."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import funcprecond as fp
from funcprecond.autodiff import evaluation as module_under_test
from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.linalg import treemath
from tests import problems, reference
from tests.equality import assert_close, assert_same, copy
from tests.problems import initialised, normal, seeded


@pytest.fixture(params=["graph", "function"])
def route(request, monkeypatch):
    """Both routes lead to the same numbers."""
    if request.param == "function":
        monkeypatch.setattr(module_under_test, "is_eager", lambda tree: False)
    return request.param


def loss_of(toy):
    x, y = toy.batch
    return lambda p: toy.problem.loss(toy.problem(p, x), y)


def vector(toy, seed=7):
    return {k: normal(p.shape, seed + i) for i, (k, p) in enumerate(toy.params.items())}


def test_the_route_is_the_one_that_was_asked_for(route):
    toy = problems.mlp()
    run = Evaluation(toy.problem, toy.params, toy.batch)._run
    assert type(run).__name__ == {"graph": "GraphRun", "function": "FunctionRun"}[route]


def test_loss_and_outputs_are_the_models(route):
    toy = problems.mlp()
    e = Evaluation(toy.problem, toy.params, toy.batch)
    assert_close(e.outputs, toy.problem(toy.params, toy.batch[0]), rtol=1e-14)
    assert_close(e.loss, F.cross_entropy(e.outputs, toy.batch[1]), rtol=1e-14)
    assert e.count == 5


def test_the_gradient_is_that_of_central_differences(route):
    toy = problems.mlp()
    expected = reference.gradient(loss_of(toy), toy.params)
    assert_close(Evaluation(toy.problem, toy.params, toy.batch).grads, expected, rtol=1e-7)


def test_pull_is_the_jacobians_transpose_and_jvp_its_product(route):
    toy = problems.mlp()
    j = reference.jacobian(lambda p: toy.problem(p, toy.batch[0]), toy.params)
    e, u, v = (
        Evaluation(toy.problem, toy.params, toy.batch, twice=True),
        normal((5, 3), 3),
        vector(toy),
    )
    assert_close(reference.ravel(e.pull(u)), j.T @ u.reshape(-1), rtol=1e-10)
    assert_close(e.jvp(v).reshape(-1), j @ reference.ravel(v), rtol=1e-10)


def test_hvp_and_ggn_are_the_dense_matrices(route):
    toy, v = problems.mlp(), vector(problems.mlp())
    e = Evaluation(toy.problem, toy.params, toy.batch, twice=True)
    h = reference.hessian(loss_of(toy), toy.params)
    g = reference.ggn(toy.problem, toy.params, toy.batch)
    flat = reference.ravel(v)
    assert_close(reference.ravel(e.hvp(v)), h @ flat, rtol=1e-10)
    assert_close(reference.ravel(e.ggn_mv(v)), g @ flat, rtol=1e-10)


def test_per_example_gradients_are_those_of_single_calls(route):
    toy = problems.mlp()
    e = Evaluation(toy.problem, toy.params, toy.batch)
    u = toy.problem.loss.empirical(e.outputs, e.targets)
    pulled = e.pull_each(u, list(toy.params))
    rows = torch.cat([g.reshape(5, -1) for g in pulled.values()], 1)
    assert_close(rows, reference.per_example(toy.problem, toy.params, toy.batch), rtol=1e-10)


@pytest.mark.parametrize("question", ["pull", "pull_layers", "jvp", "ggn_mv", "hvp"])
def test_the_last_question_is_answered_as_any_other(question, route):
    toy = problems.convnet()
    options = {"layers": True, "twice": True}
    kept, last = (Evaluation(toy.problem, toy.params, toy.batch, **options) for _ in range(2))
    given = normal(kept.outputs.shape, 3) if question.startswith("pull") else vector(toy)
    expected = getattr(kept, question)(given)
    assert_same(getattr(last, question)(given, keep=False), expected)
    assert_same(getattr(kept, question)(given), expected)


@pytest.mark.parametrize("question", ["pull", "ggn_mv", "hvp"])
def test_what_is_asked_after_the_last_question_is_refused(question):
    toy = problems.convnet()
    e = Evaluation(toy.problem, toy.params, toy.batch, twice=True)
    given = normal(e.outputs.shape, 3) if question == "pull" else vector(toy)
    getattr(e, question)(given, keep=False)
    with pytest.raises(RuntimeError, match="keep=False"):
        getattr(e, question)(given)


@pytest.mark.parametrize("chunk", [1, 2, 5, 7])
def test_the_chunk_size_changes_nothing_but_memory(chunk):
    toy = problems.mlp()
    e = Evaluation(toy.problem, toy.params, toy.batch)
    u = normal((5, 3))
    assert_close(e.pull_each(u, ["0.weight"], chunk), e.pull_each(u, ["0.weight"]), rtol=1e-12)


def test_layer_gradients_are_those_with_respect_to_the_layers_outputs(route):
    toy = problems.mlp()
    e = Evaluation(toy.problem, toy.params, toy.batch, layers=True)
    x, y = toy.batch
    p = toy.params
    z0 = F.linear(x, p["0.weight"], p["0.bias"])
    z1 = F.linear(torch.tanh(z0), p["2.weight"], p["2.bias"])
    d1 = torch.func.grad(lambda z: F.cross_entropy(z, y))(z1)
    d0 = torch.func.grad(
        lambda z: F.cross_entropy(F.linear(torch.tanh(z), p["2.weight"], p["2.bias"]), y)
    )(z0)
    assert_close(list(e.layer_grads), [d0, d1], rtol=1e-10)
    assert_close(list(e.layer_inputs), [x, torch.tanh(z0)], rtol=1e-12)
    u = normal((5, 3))
    assert_close(e.pull_layers(u)[1], u, rtol=1e-12)


def test_a_layer_that_nothing_reaches_has_a_gradient_of_zero(route):
    def model(p, x):
        F.linear(x, p["dead"])
        return F.linear(x, p["w"])

    params = {"dead": normal((4, 3)), "w": normal((2, 3))}
    problem = fp.problem(model, fp.losses.mse, params=params)
    e = Evaluation(problem, params, (normal((5, 3)), normal((5, 2))), layers=True)
    assert not e.grads["dead"].any()
    assert e.layer_grads[0].shape == (5, 4)
    assert not e.layer_grads[0].any()


def test_the_objective_elsewhere_is_on_the_same_batch(route):
    toy = problems.mlp()
    e = Evaluation(toy.problem, toy.params, toy.batch)
    there = treemath.add(toy.params, vector(toy), 0.1)
    loss, grads = e.objective(there)
    assert_close(loss, loss_of(toy)(there), rtol=1e-13)
    assert_close(grads, reference.gradient(loss_of(toy), there), rtol=1e-7)
    assert_close(e.value(there), loss, rtol=1e-13)


def test_the_objective_here_is_the_loss_and_the_gradient(route):
    toy = problems.convnet()
    e = Evaluation(toy.problem, toy.params, toy.batch)
    assert_close(e.objective(toy.params), (e.loss, e.grads), rtol=1e-12)


def dropout_problem():
    module = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3))
    return fp.problem(initialised(module), fp.losses.cross_entropy), problems.labelled(5, 3, 3, 0)


def test_all_that_is_asked_of_one_evaluation_sees_one_mask(route):
    problem, batch = dropout_problem()
    e = Evaluation(problem, problem.params, batch, generator=seeded(4), twice=True)

    def masked(p):
        h = F.linear(batch[0], p["0.weight"], p["0.bias"]) * e.masks[0] / 0.5
        return F.linear(torch.tanh(h), p["3.weight"], p["3.bias"])

    def loss(p):
        return F.cross_entropy(masked(p), batch[1])

    v = {k: normal(p.shape, i) for i, (k, p) in enumerate(problem.params.items())}
    assert_close(e.grads, torch.func.grad(loss)(problem.params), rtol=1e-10)
    assert_close(
        e.hvp(v), reference.difference(torch.func.grad(loss), problem.params, v), rtol=1e-7
    )
    assert_close(e.jvp(v), reference.difference(masked, problem.params, v), rtol=1e-7)
    assert_close(e.value(problem.params), e.loss, rtol=1e-12)
    assert_close(e.objective(problem.params)[1], e.grads, rtol=1e-12)


def test_products_of_an_evaluation_that_was_not_told_are_right_or_refused(route):
    """``twice`` is a promise, not a switch: a product without it must not be silently zero."""
    toy, v = problems.mlp(), vector(problems.mlp())
    e = Evaluation(toy.problem, toy.params, toy.batch)
    expected = Evaluation(toy.problem, toy.params, toy.batch, twice=True).hvp(v)
    try:
        product = e.hvp(v)
    except RuntimeError as error:
        assert "twice" in str(error)
    else:
        assert_close(product, expected, rtol=1e-10)


def test_nothing_of_the_callers_is_touched(route):
    toy = problems.mlp()
    params = {k: p.clone().requires_grad_(k == "0.bias") for k, p in toy.params.items()}
    before = copy((params, toy.batch))
    e = Evaluation(toy.problem, params, toy.batch, layers=True, twice=True)
    with torch.no_grad():
        results = (e.grads, e.hvp(vector(toy)), e.ggn_mv(vector(toy)), e.layer_grads, e.loss)
    del results
    assert_same(
        {k: p.detach() for k, p in params.items()},
        copy({k: p.detach() for k, p in before[0].items()}),
    )
    assert [p.requires_grad for p in params.values()] == [False, True, False, False]
    assert all(p.grad is None for p in params.values())


def test_results_carry_no_graph_in_plain_eager():
    toy = problems.mlp()
    e = Evaluation(toy.problem, toy.params, toy.batch, layers=True, twice=True)
    results = [
        e.loss,
        e.outputs,
        e.grads,
        e.hvp(vector(toy)),
        e.jvp(vector(toy)),
        e.ggn_mv(vector(toy)),
    ]
    results += [list(e.layer_grads), list(e.layer_inputs), e.objective(toy.params)]
    leaves = torch.utils._pytree.tree_leaves(results)
    assert not any(x.requires_grad for x in leaves)


def test_gradients_flow_through_where_the_params_ask_for_them():
    """The other route: a loss of a gradient, differentiated by plain autograd."""
    toy = problems.mlp()
    leaves = {k: p.clone().requires_grad_() for k, p in toy.params.items()}
    treemath.dot(*(2 * [Evaluation(toy.problem, leaves, toy.batch).grads])).backward()
    e = Evaluation(toy.problem, toy.params, toy.batch, twice=True)
    expected = treemath.mul(e.hvp(e.grads), 2.0)
    assert_close({k: p.grad for k, p in leaves.items()}, expected, rtol=1e-10)


def test_under_no_grad_it_still_differentiates():
    toy = problems.mlp()
    with torch.no_grad():
        grads = Evaluation(toy.problem, toy.params, toy.batch).grads
    assert_close(grads, Evaluation(toy.problem, toy.params, toy.batch).grads, rtol=1e-14)


def test_under_inference_mode_it_differentiates_or_says_no():
    toy = problems.mlp()
    expected = Evaluation(toy.problem, toy.params, toy.batch).grads
    with torch.inference_mode():
        try:
            grads = Evaluation(toy.problem, toy.params, toy.batch).grads
        except RuntimeError:
            return
    assert_close({k: g.clone() for k, g in grads.items()}, expected, rtol=1e-12)


def test_vmap_over_params_is_the_loop():
    toy, v = problems.mlp(), vector(problems.mlp())
    members = [treemath.add(toy.params, vector(toy, i), 0.1) for i in range(3)]

    def measure(p):
        e = Evaluation(toy.problem, p, toy.batch, layers=True, twice=True)
        return e.loss, e.grads, e.hvp(v), e.ggn_mv(v), list(e.layer_grads), list(e.layer_inputs)

    stacked = torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *members)
    mapped = torch.vmap(measure)(stacked)
    for i, p in enumerate(members):
        single = torch.utils._pytree.tree_map(lambda x, i=i: x[i], mapped)
        assert_close(single, measure(p), rtol=1e-9)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False).eval()]
)
def test_per_example_gradients_of_coupled_examples_are_refused(norm):
    module = initialised(nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 3)))
    problem = fp.problem(module, fp.losses.cross_entropy)
    e = Evaluation(problem, problem.params, problems.labelled(5, 3, 3, 0))
    with pytest.raises(ValueError, match="BatchNorm1d .1..*GroupNorm"):
        e.pull_each(normal((5, 3)), ["0.weight"])


def test_outputs_without_examples_are_refused(route):
    def empty(p, x):
        return (p["w"] * x)[:0]

    problem = fp.problem(empty, lambda f, y: f.sum(), params={"w": normal((3,))})
    with pytest.raises(ValueError, match="axis 0 must count"):
        Evaluation(problem, problem.params, (normal((4, 3)), None))


def test_a_model_that_uses_no_parameter_has_a_gradient_of_zero(route):
    problem = fp.problem(lambda p, x: 2 * x, fp.losses.mse, params={"w": normal((3,))})
    e = Evaluation(problem, problem.params, (normal((4, 3)), normal((4, 3), 1)), twice=True)
    v = {"w": normal((3,))}
    assert not any(x["w"].any() for x in (e.grads, e.hvp(v), e.ggn_mv(v)))


def test_a_linear_loss_has_a_hessian_of_zero(route):
    problem = fp.problem(lambda p, x: x * p["w"], lambda f, y: f.mean(), params={"w": normal((3,))})
    e = Evaluation(problem, problem.params, (normal((4, 3)), None), twice=True)
    assert not e.hvp({"w": normal((3,))})["w"].any()


def test_half_precision_parameters_have_half_precision_products(route):
    toy = problems.mlp(torch.bfloat16)
    v = {k: x.bfloat16() for k, x in vector(toy).items()}
    e = Evaluation(toy.problem, toy.params, toy.batch, twice=True)
    for result in (e.grads, e.hvp(v), e.ggn_mv(v)):
        assert {g.dtype for g in result.values()} == {torch.bfloat16}


def parametrised():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    nn.utils.parametrizations.weight_norm(model[0])
    return model


class Twice(nn.Module):
    """A weight used twice, and its transpose once more."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.inner(torch.tanh(self.inner(x)))
        return self.outer(nn.functional.linear(x, self.inner.weight.T))


def convolutional():
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten())


@pytest.mark.parametrize("make", [parametrised, Twice, convolutional])
def test_a_hessian_product_needs_no_gradient_and_can_do_with_one(make):
    problem = fp.problem(initialised(make()), fp.losses.cross_entropy)
    batch = (normal((6, 4), 1), torch.tensor([0, 2, 1, 1, 0, 2]))
    v = {k: normal(p.shape, i) for i, (k, p) in enumerate(problem.params.items())}
    gradient = torch.func.grad(lambda p: problem.loss(problem(p, batch[0]), batch[1]))
    expected = reference.difference(gradient, problem.params, v)
    alone = fp.linearize(problem, problem.params, batch)
    assert_close(alone.hvp(v), expected, rtol=1e-6, atol=1e-8)
    assert_close(alone.grads, gradient(problem.params), rtol=1e-10, atol=1e-12)
    after = fp.linearize(problem, problem.params, batch)
    assert_close(after.grads, gradient(problem.params), rtol=1e-10, atol=1e-12)
    assert_close(after.hvp(v), expected, rtol=1e-6, atol=1e-8)
    assert_close(alone.hvp(v), expected, rtol=1e-6, atol=1e-8)


def test_the_value_of_a_gradient_that_nobody_asked_for_is_not_computed():
    module = initialised(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)))
    problem = fp.problem(module, fp.losses.cross_entropy)
    batch = (normal((4, 8), 1), torch.tensor([0, 2, 1, 7]))
    v = {k: normal(p.shape, i) for i, (k, p) in enumerate(problem.params.items())}
    products = []
    for asked in (False, True):
        evaluation = fp.linearize(problem, problem.params, batch)
        with FlopCounterMode(display=False) as counter:
            if asked:
                evaluation.grads  # noqa: B018
            evaluation.hvp(v, keep=False)
        products.append(counter.get_total_flops() / (2 * 4 * 8 * 8))
    assert products[1] - products[0] == 2  # one of each layer's
