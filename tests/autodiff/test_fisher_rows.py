"""Fisher products by layer against the rows themselves, written out."""

import pytest
import torch

import funcprecond as fp
from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.curvature.fisher import fisher_rows
from tests import problems, reference
from tests.autodiff.test_op_table import COUPLED, MODELS, build
from tests.equality import assert_close, assert_same
from tests.operators.test_curvature_matrices import rows
from tests.problems import Toy, normal, seeded

# No formula by layer, or outputs that depend on other examples.


def by_layer(problem, batch):
    evaluation = Evaluation(problem, problem.params, batch, layers=True, twice=True)
    return fisher_rows(evaluation, "empirical", None)


@pytest.mark.parametrize("model", sorted(m for m in MODELS if "drop" not in m))
def test_the_empirical_matrix_is_that_of_the_examples_rows(model):
    problem, batch = build(model)
    toy = Toy(problem, (batch,))
    g, c = rows(toy, batch)
    v = normal((g.shape[1],), 1)
    vector = reference.unravel(v, problem.params)
    expected = c * g.T @ (g @ v)
    operator = fp.Fisher(problem, problem.params, batch, labels="empirical")
    once = fp.fisher_mv(problem, problem.params, batch, vector, labels="empirical")
    assert_close(reference.ravel(operator @ vector), expected, rtol=1e-9)
    assert_same(operator @ vector, operator @ vector)
    assert_close(reference.ravel(once), expected, rtol=1e-9)
    if model in COUPLED:
        assert by_layer(problem, batch) is None


@pytest.mark.parametrize(
    "model",
    ["layer norm", "group norm", "conv, grouped", "conv of sequences", "embedding", "linear, tied"],
)
def test_layers_tell_of_these_models(model):
    problem, batch = build(model)
    assert by_layer(problem, batch) is not None


@pytest.mark.parametrize("samples", [1, 3])
def test_the_sampled_matrix_is_that_of_the_sampled_cotangents(samples):
    toy = problems.mlp()
    x, y = toy.batch
    noise = toy.problem.loss.label_noise(y, samples, seeded(3))
    u = toy.problem.loss.sampled(toy.problem(toy.params, x), y, noise)
    jacobian = torch.func.jacrev(lambda p: toy.problem(p, x))(toy.params)
    j = torch.cat([t.flatten(2) for t in jacobian.values()], 2)
    r = torch.einsum("vnc,ncp->vnp", u, j).flatten(0, 1)
    c = toy.problem.loss.constant(u[0], y)
    v = normal((r.shape[1],), 1)
    found = fp.fisher_mv(
        toy.problem,
        toy.params,
        toy.batch,
        reference.unravel(v, toy.params),
        labels="mc",
        noise=noise,
    )
    assert_close(reference.ravel(found), c * r.T @ (r @ v), rtol=1e-10)


def plain(function, **params):
    """A problem without a module, on five examples of three features."""
    params = {k: normal(s, i + 1) for i, (k, s) in enumerate(params.items())}
    problem = fp.problem(function, fp.losses.cross_entropy, params=params)
    return Toy(problem, ((normal((5, 3), 7), torch.tensor([0, 2, 1, 1, 0])),))


PLAIN = {
    "a position added": (lambda p, x: (x + p["b"]) @ p["w"], True),
    "added from the left": (lambda p, x: p["b"] + x @ p["w"], True),
    "used twice": (lambda p, x: torch.tanh(x @ p["w"] + p["b"]) @ p["w"] + p["b"], True),
    "examples centred": (lambda p, x: (x @ p["w"] - (x @ p["w"]).mean(0)) + p["b"], False),
    "no single example": (lambda p, x: (x @ p["w"]) / x.std(0).nan_to_num(1) + p["b"], False),
    "multiplied": (lambda p, x: x @ p["w"] * p["b"], True),
    "divided": (lambda p, x: x @ p["w"] / p["b"], False),
    "not used": (lambda p, x: x @ p["w"], True),
    "on the parameters alone": (lambda p, x: x @ (p["w"] + p["b"]), False),
}


@pytest.mark.parametrize("case", PLAIN)
def test_plain_functions(case):
    function, known = PLAIN[case]
    toy = plain(function, w=(3, 3), b=(3,))
    g, c = rows(toy, toy.batch)
    operator = fp.Fisher(toy.problem, toy.params, toy.batch, labels="empirical")
    assert_close(operator.to_dense(), c * g.T @ g, rtol=1e-9)
    assert (by_layer(toy.problem, toy.batch) is not None) == known


COUPLINGS = {
    "those before": lambda h: h.cumsum(0),
    "those after": lambda h: h.flip(0).cumsum(0).flip(0),
    "the first": lambda h: h - h[:1],
    "the last": lambda h: h - h[-1:],
    "a neighbour": lambda h: h + h.roll(1, 0),
    "all": lambda h: h - h.mean(0),
    "all, in the first": lambda h: torch.cat([h.sum(0, keepdim=True), h[1:]]),
    "all, in the last": lambda h: torch.cat([h[:-1], h.sum(0, keepdim=True)]),
}


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("couple", COUPLINGS)
def test_examples_that_depend_on_others_are_not_taken_apart(couple, count):
    params = {"w": normal((3, 3))}
    f = COUPLINGS[couple]
    problem = fp.problem(lambda p, x: f(x @ p["w"]), fp.losses.cross_entropy, params=params)
    batch = (normal((count, 3)), torch.arange(count) % 3)
    assert by_layer(problem, batch) is None
    apart = fp.problem(lambda p, x: x @ p["w"], fp.losses.cross_entropy, params=params)
    assert by_layer(apart, batch) is not None
