import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcprecond as fp
from funcprecond.curvature.per_sample import PerSampleGrads
from tests import problems, reference
from tests.autodiff.test_op_table import COUPLED, MODELS, build
from tests.equality import assert_close
from tests.problems import Toy, initialised, normal, seeded


def rows_of(grads):
    return torch.cat([g.reshape(g.shape[0], -1) for g in grads.values()], 1)


@pytest.mark.parametrize("make", [problems.mlp, problems.mlp_function, problems.convnet])
def test_rows_are_the_gradients_of_the_examples_alone(make):
    toy = make()
    rows = rows_of(fp.per_sample_grads(toy.problem, toy.params, toy.batch))
    expected = reference.per_example(toy.problem, toy.params, toy.batch)
    assert_close(rows, expected, rtol=1e-9)


def test_of_several_terms_a_row_is_their_sum():
    """The mean over two outputs an example: c is 2 / numel, a row c^-1 of the total's share."""
    toy = problems.regression()
    rows = rows_of(fp.per_sample_grads(toy.problem, toy.params, toy.batch))
    x, y = toy.batch

    def example(p, n):
        return (toy.problem(p, x[n : n + 1]) - y[n : n + 1]).square().sum() / 2

    expected = [
        reference.ravel(torch.func.grad(lambda p, n=n: example(p, n))(toy.params)) for n in range(6)
    ]
    assert_close(rows, torch.stack(expected), rtol=1e-10)


@pytest.mark.parametrize("make", [problems.mlp, problems.regression, problems.convnet])
def test_their_sum_times_the_scale_is_the_gradient(make):
    toy, need = make(), PerSampleGrads()
    evidence = fp.observe(toy.problem, toy.params, toy.batch, (need,))
    value = evidence[need]
    total = {k: value.scale * g.sum(0) for k, g in value.grads.items()}
    assert_close(total, evidence.grads, rtol=1e-9)


def test_the_diagonal_is_the_empirical_fishers():
    toy, need = problems.mlp(), PerSampleGrads()
    value = fp.observe(toy.problem, toy.params, toy.batch, (need,))[need]
    rows = reference.per_example(toy.problem, toy.params, toy.batch)
    fisher = rows.T @ rows / len(rows)
    assert_close(reference.ravel(value.diagonal()), fisher.diagonal(), rtol=1e-9)


@pytest.mark.parametrize("make", [problems.mlp, problems.convnet])
@pytest.mark.parametrize("size", [2, 4, 100])
def test_chunks_give_the_same_rows(make, size):
    toy = make()
    whole = fp.per_sample_grads(toy.problem, toy.params, toy.batch)
    chunked = fp.per_sample_grads(toy.problem, toy.params, toy.batch, chunk_size=size)
    assert_close(chunked, whole, rtol=1e-12)


@pytest.mark.parametrize("name", [m for m in MODELS if m not in COUPLED])
def test_of_every_kind_of_layer_the_rows_are_those_by_vmap_and_of_the_need(name):
    """By layer and alone, by layer beside the gradient, and example by example."""
    problem, batch = build(name)
    problem.module.eval()
    params, need = problem.params, PerSampleGrads()
    evaluation = fp.Evaluation(problem, params, batch)
    cotangents = problem.loss.empirical(evaluation.outputs, batch[1])
    expected = evaluation.pull_each(cotangents, list(params))
    assert_close(fp.per_sample_grads(problem, params, batch), expected, rtol=1e-9)
    found = fp.observe(problem, params, batch, (need,))[need].grads
    assert_close(found, expected, rtol=1e-9)


def test_rows_have_the_parameters_dtype():
    problem = fp.problem(nn.Linear(3, 3).bfloat16(), fp.losses.cross_entropy)
    x, y = problems.mlp().batch
    rows = fp.per_sample_grads(problem, problem.params, (x.bfloat16(), y))
    assert {g.dtype for g in rows.values()} == {torch.bfloat16}


def test_every_example_has_its_own_dropout_mask():
    module = initialised(nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5), nn.Linear(6, 3)))
    toy = Toy(fp.problem(module, fp.losses.cross_entropy), problems.mlp().batches)
    need = PerSampleGrads()
    evidence = fp.observe(toy.problem, toy.params, toy.batch, (need,), generator=seeded(1))
    value = evidence[need]
    total = {k: value.scale * g.sum(0) for k, g in value.grads.items()}
    assert_close(total, evidence.grads, rtol=1e-9)


def test_inputs_without_an_example_axis_are_shared():
    """A mask that belongs to the batch as a whole, as one entry of a tuple of inputs."""

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x, shift):
            return self.layer(x + shift)

    problem = fp.problem(initialised(Shifted()), fp.losses.cross_entropy)
    x, y = problems.mlp().batch
    shift = normal((3,), 9)
    rows = rows_of(fp.per_sample_grads(problem, problem.params, ((x, shift), y)))
    shifted = fp.problem(initialised(nn.Linear(3, 3)), fp.losses.cross_entropy)
    expected = reference.per_example(shifted, shifted.params, (x + shift, y))
    assert_close(rows, expected, rtol=1e-9)


def test_a_frozen_batch_norm_is_fine_and_one_in_training_is_named():
    module = initialised(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    problem, batch = fp.problem(module, fp.losses.cross_entropy), problems.mlp().batch
    with pytest.raises(ValueError, match="BatchNorm1d '1' in training mode"):
        fp.per_sample_grads(problem, problem.params, batch)
    module.eval()
    rows = rows_of(fp.per_sample_grads(problem, problem.params, batch))
    assert_close(rows, reference.per_example(problem, problem.params, batch), rtol=1e-9)


class Graph(nn.Module):
    """Nodes of one graph, with a gain that no layer covers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)
        self.gain = nn.Parameter(torch.randn(4))

    def forward(self, nodes, adjacency):
        hidden = torch.tanh(adjacency @ self.first(nodes)) * self.gain.exp()
        return adjacency @ self.second(hidden)


def test_the_nodes_of_one_graph_have_the_gradients_of_their_losses_in_the_whole_graph():
    x, y = problems.mlp().batch
    adjacency = normal((len(x), len(x)), 3)
    batch = ((x, adjacency), y)
    problem = fp.problem(initialised(Graph()), fp.losses.cross_entropy, in_axes=None)

    def node(p, n):
        return F.cross_entropy(problem(p, batch[0])[n], y[n])

    slopes = [torch.func.grad(lambda p, n=n: node(p, n))(problem.params) for n in range(len(x))]
    expected = torch.stack([reference.ravel(s) for s in slopes])
    rows = rows_of(fp.per_sample_grads(problem, problem.params, batch))
    assert_close(rows, expected, rtol=1e-10)
    assert_close(
        fp.per_sample_gram(problem, problem.params, batch), expected @ expected.T, rtol=1e-10
    )
    norms = fp.per_sample_norms(problem, problem.params, batch)
    assert_close(norms, expected.square().sum(1).sqrt(), rtol=1e-10)


@pytest.mark.parametrize("in_axes", [None, "auto"])
def test_the_factors_of_a_graph_keep_the_run_for_what_no_layer_covers(in_axes):
    """Where the examples are coupled, their diagonal is estimated with random signs."""
    x, y = problems.mlp().batch
    batch = ((x, torch.eye(len(x), dtype=x.dtype) + normal((len(x), len(x)), 3)), y)
    problem = fp.problem(initialised(Graph()), fp.losses.cross_entropy, in_axes=in_axes)
    kfac = fp.KroneckerFactored(problem, problem.params, batch, labels="exact")
    diagonal = kfac.diagonal()["gain"]
    exact = reference.ggn(problem, problem.params, batch).diagonal()
    expected = reference.unravel(exact, problem.params)["gain"]
    assert bool((diagonal > 0).all())
    assert 0.1 < diagonal.sum() / expected.sum() < 10
