import pytest
import torch

import funcprecond as fp
from funcprecond.operators.operator import Operator
from tests import problems, reference
from tests.autodiff.test_op_table import COUPLED, MODELS, build
from tests.equality import assert_close
from tests.operators.test_curvature_matrices import LOSSES, with_loss
from tests.problems import normal, seeded


@pytest.mark.parametrize("model", [m for m in MODELS if m not in COUPLED])
def test_on_every_layer_it_is_the_diagonal_of_the_products(model):
    problem, batch = build(model)
    ggn = fp.GGN(problem, problem.params, batch, generator=seeded(3))
    by_products = Operator.diagonal(ggn)
    assert_close(reference.ravel(ggn.diagonal()), reference.ravel(by_products), rtol=1e-8)


def test_it_is_the_dense_matrixs_and_so_are_its_verbs():
    toy = problems.convnet()
    g = reference.ggn(toy.problem, toy.params, toy.batch).diagonal()
    c = fp.DiagonalGGN(toy.problem, toy.params, toy.batch)
    assert_close(reference.ravel(c.values), g, rtol=1e-9)
    v = normal(g.shape, 1)
    vector = reference.unravel(v, toy.params)
    assert_close(reference.ravel(c @ vector), g * v, rtol=1e-9)
    assert_close(reference.ravel(c.inverse(0.1) @ vector), v / (g + 0.1), rtol=1e-9)
    assert_close(reference.ravel(c.power(-0.5, 0.1).values), (g + 0.1) ** -0.5, rtol=1e-9)
    assert_close(c.logdet(0.1), (g + 0.1).log().sum(), rtol=1e-10)
    assert_close(c.trace(), g.sum(), rtol=1e-10)
    assert_close(c.frobenius_norm(), g.norm(), rtol=1e-10)
    assert_close(c.to_dense(), g.diag(), rtol=1e-9)
    solution = c.solve(vector, damping=0.1)
    assert_close(reference.ravel(solution.solution), v / (g + 0.1), rtol=1e-9)
    stack = {k: torch.stack([x, 2 * x]) for k, x in vector.items()}
    assert_close(reference.ravel({k: x[1] for k, x in (c @ stack).items()}), 2 * g * v, rtol=1e-9)


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_its_scale_and_no_trace_of_the_split(name, reduction, rank):
    toy = with_loss(name, reduction, rank)
    x, y = toy.batch
    batches = [(x[s], y[s]) for s in (slice(0, 2), slice(2, 7))]
    whole = fp.DiagonalGGN(toy.problem, toy.params, toy.batch)
    g = reference.ggn(toy.problem, toy.params, toy.batch).diagonal()
    assert_close(reference.ravel(whole.values), g, rtol=1e-9)
    split = fp.DiagonalGGN(toy.problem, toy.params, batches=batches)
    assert_close(split.values, whole.values, rtol=1e-9)
    trace = fp.GGN(toy.problem, toy.params, batches=batches).trace()
    assert_close(trace, g.sum(), rtol=1e-10)


@pytest.mark.parametrize("labels", ["mc", "empirical"])
def test_the_other_labels_are_the_diagonals_of_their_fisher_matrices(labels):
    toy = problems.convnet()
    fisher = fp.Fisher(
        toy.problem, toy.params, toy.batch, labels=labels, samples=2, generator=seeded(0)
    )
    found = fp.DiagonalGGN(
        toy.problem, toy.params, toy.batch, labels=labels, samples=2, generator=seeded(0)
    )
    dense = fisher.to_dense().diagonal()
    assert_close(reference.ravel(found.values), dense, rtol=1e-9)
    assert_close(reference.ravel(fisher.diagonal()), dense, rtol=1e-9)


def test_examples_that_vmap_cannot_run_are_run_one_by_one():
    problem, batch = build("lstm")
    found = fp.DiagonalGGN(problem, problem.params, batch).diagonal()
    dense = fp.GGN(problem, problem.params, batch).to_dense().diagonal()
    assert_close(reference.ravel(found), dense, rtol=1e-9)


def test_coupled_examples_are_refused_and_the_operator_goes_by_products():
    problem, batch = build("batch norm, train")
    with pytest.raises(ValueError, match="couples the examples"):
        fp.DiagonalGGN(problem, problem.params, batch)
    ggn = fp.GGN(problem, problem.params, batch)
    assert_close(reference.ravel(ggn.diagonal()), ggn.to_dense().diagonal(), rtol=1e-10)
