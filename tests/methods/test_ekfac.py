"""EKFAC's second moments and directions against dense per-sample gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcprecond as fp
from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.layers.blocks import split_block
from tests import problems, reference


class Sequence(nn.Module):
    """A linear layer shared by the positions, pooled after a nonlinearity."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(self.first(x).tanh().sum(1))


def networks():
    ids = torch.tensor([[0, 2, 2], [4, 1, 0], [3, 3, 3], [1, 0, 4]])
    labels = torch.tensor([0, 1, 2, 0])
    return {
        "mlp": (problems.mlp_module(), (problems.normal((4, 3)), labels)),
        "sequence": (problems.initialised(Sequence()), (problems.normal((4, 5, 3)), labels)),
        "convolution": (
            problems.initialised(
                nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
            ),
            (problems.normal((4, 2, 3, 3)), labels),
        ),
        "groups": (
            problems.initialised(
                nn.Sequential(
                    nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
                )
            ),
            (problems.normal((4, 2, 3, 3)), labels),
        ),
        "embedding": (
            problems.initialised(
                nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Tanh(), nn.Linear(9, 3))
            ),
            (ids, labels),
        ),
    }


NETWORKS = networks()


def updated(name, **options):
    model, batch = NETWORKS[name]
    problem = fp.problem(model, fp.losses.cross_entropy)
    opt = fp.ekfac(labels="empirical", decay=None, start=0, **options)
    evidence = fp.observe(problem, problem.params, batch, opt.needs(0))
    state, direction = opt.update(opt.init(problem.params), evidence.grads, evidence)
    return problem, batch, state, direction, evidence


def example_matrices(problem, batch, block):
    """(N, o, i + 1): each example's gradient of its own loss."""
    weight, bias = split_block(block)
    inputs, targets = batch
    found = []
    for n in range(len(targets)):
        one = fp.observe(problem, problem.params, (inputs[n : n + 1], targets[n : n + 1])).grads
        matrix = one[weight].flatten(1)
        found.append(matrix if bias is None else torch.cat([matrix, one[bias].unsqueeze(1)], 1))
    return torch.stack(found)


def full_basis(state, block, shape):
    """(P, P): the columns are the eigenbasis, row-major."""
    right = state.right[block]
    left = state.left.get(block, reference.eye(shape[0]))
    if right.ndim == 2:
        return torch.kron(left.contiguous(), right.contiguous())
    return torch.block_diag(
        *(torch.kron(x.contiguous(), y.contiguous()) for x, y in zip(left, right, strict=True))
    )


@pytest.mark.parametrize("name", list(NETWORKS))
def test_moments_are_those_of_whole_example_gradients_in_the_basis(name):
    problem, batch, state, _, _ = updated(name)
    for block, moments in state.moments.items():
        matrices = example_matrices(problem, batch, block)
        basis = full_basis(state, block, matrices.shape[1:])
        rotated = matrices.flatten(1) @ basis
        torch.testing.assert_close(moments.reshape(-1) / state.normalizer, rotated.square().mean(0))


@pytest.mark.parametrize("name", list(NETWORKS))
def test_the_direction_solves_in_that_basis(name):
    problem, _, state, direction, evidence = updated(name, damping=0.1)
    for block, moments in state.moments.items():
        weight, bias = split_block(block)

        def matrix(tree, weight=weight, bias=bias):
            m = tree[weight].flatten(1)
            return (m if bias is None else torch.cat([m, tree[bias].unsqueeze(1)], 1)).reshape(-1)

        basis = full_basis(state, block, problem.params[weight].flatten(1).shape)
        dense = basis @ torch.diag(moments.reshape(-1) / state.normalizer) @ basis.T
        expected = torch.linalg.solve(
            dense + 0.1 * reference.eye(len(dense)), matrix(evidence.grads)
        )
        torch.testing.assert_close(matrix(direction), expected)


@pytest.mark.parametrize("name", ["mlp", "sequence"])
def test_it_approximates_the_fisher_block_at_least_as_well_as_kfac(name):
    problem, batch, state, _, _ = updated(name)
    need = LayerStatistics("empirical")
    for block in state.moments:
        matrices = example_matrices(problem, batch, block)
        rows = matrices.flatten(1)
        fisher = rows.T @ rows / len(rows)
        basis = full_basis(state, block, matrices.shape[1:])
        ours = basis @ torch.diag(state.moments[block].reshape(-1) / state.normalizer) @ basis.T
        evidence = fp.observe(problem, problem.params, batch, (need,))
        kfac = fp.representation.kronecker_io.KroneckerIO.init(problem.params)
        kfac = kfac.accumulate(evidence[need], None).block(block)
        assert (ours - fisher).norm() <= (kfac - fisher).norm() + 1e-12


def test_one_datum_is_exact():
    model, (inputs, targets) = NETWORKS["mlp"]
    problem = fp.problem(model, fp.losses.cross_entropy)
    opt = fp.ekfac(labels="exact", decay=None, damping=0.1)
    batch = (inputs[:1], targets[:1])
    evidence = fp.observe(problem, problem.params, batch, opt.needs(0))
    _, direction = opt.update(opt.init(problem.params), evidence.grads, evidence)
    kfac = fp.kflr(decay=None, damping=0.1)
    evidence = fp.observe(problem, problem.params, batch, kfac.needs(0))
    _, expected = kfac.update(kfac.init(problem.params), evidence.grads, evidence)
    for k in expected:
        torch.testing.assert_close(direction[k], expected[k])


def test_moments_start_anew_in_a_new_basis():
    toy = problems.mlp()
    opt = fp.ekfac(labels="empirical", decay=0.9, refresh_every=2, start=0)
    state, weights = opt.init(toy.params), []
    for t in range(4):
        evidence = fp.observe(toy.problem, toy.params, toy.at(t), opt.needs(t))
        state, _ = opt.update(state, evidence.grads, evidence)
        weights.append(float(state.normalizer))
    assert weights == pytest.approx([0.1, 0.19, 0.1, 0.19])


def test_a_layer_that_mixes_the_examples_is_left_to_the_diagonal():
    def model(p, x):
        return F.linear(F.linear(x.mT, p["mix"]).mT, p["w"])

    params = {"mix": problems.normal((4, 4)), "w": problems.normal((3, 3), 1)}
    problem = fp.problem(model, fp.losses.cross_entropy, params=params)
    opt = fp.ekfac(labels="empirical")
    batch = (problems.normal((4, 3)), torch.tensor([0, 1, 2, 0]))
    with pytest.warns(UserWarning, match="'mix'.*only the diagonal"):
        evidence = fp.observe(problem, params, batch, opt.needs(0))
    state, direction = opt.update(opt.init(params), evidence.grads, evidence)
    assert set(state.factors.others) == {"mix"}
    assert direction["mix"].isfinite().all()


def test_the_refresh_interval_must_be_a_multiple_of_the_measurements():
    with pytest.raises(ValueError, match="multiple"):
        fp.ekfac(every=3, refresh_every=10)
