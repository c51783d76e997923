"""K-FAC against dense natural gradients, and its intervals."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcprecond as fp
from funcprecond.linalg import treemath
from funcprecond.linalg.gram import square
from funcprecond.need import NotDue
from tests import problems, reference
from tests.equality import assert_close, assert_same


def dense_solve(matrix, grads, damping):
    vector = reference.ravel(grads)
    solved = torch.linalg.solve(matrix + damping * reference.eye(len(vector)), vector)
    return reference.unravel(solved, grads)


def test_on_a_linear_model_with_squared_error_it_is_the_damped_newton_step():
    problem = fp.problem(problems.initialised(nn.Linear(4, 3)), fp.losses.mse)
    batch = (problems.normal((7, 4)), problems.normal((7, 3), 1))
    opt = fp.kflr(damping=0.1, decay=None)
    evidence = fp.observe(problem, problem.params, batch, opt.needs(0))
    _, direction = opt.update(opt.init(problem.params), evidence.grads, evidence)
    hessian = reference.ggn(problem, problem.params, batch)
    assert_close(direction, dense_solve(hessian, evidence.grads, 0.1), rtol=1e-9)


def test_scaling_the_loss_and_the_damping_leaves_the_direction():
    toy = problems.mlp()
    directions = []
    for factor in (1.0, 8.0):
        loss = fp.losses.CrossEntropy(reduction="mean" if factor == 1 else "sum")
        problem = fp.problem(problems.mlp_module(), loss)
        batch = problems.labelled(8, 3, 3, 0)
        opt = fp.kflr(damping=0.01 * factor, decay=None)
        evidence = fp.observe(problem, toy.params, batch, opt.needs(0))
        directions.append(opt.update(opt.init(toy.params), evidence.grads, evidence)[1])
    assert_close(*directions, rtol=1e-9)


def test_statistics_and_decompositions_have_intervals_of_their_own():
    toy = problems.mlp()
    opt = fp.kfac(every=2, refresh_every=4, start=1, decay=0.5)
    state, states = opt.init(toy.params), []
    for t in range(5):
        evidence = fp.observe(
            toy.problem, toy.params, toy.at(t), opt.needs(t), generator=problems.seeded(t)
        )
        state, _ = opt.update(state, evidence.grads, evidence)
        states.append(state)
    assert states[1].representation is states[0].representation
    assert not torch.equal(
        states[2].representation.left["0.weight+0.bias"],
        states[1].representation.left["0.weight+0.bias"],
    )
    assert all(s.factor is states[0].factor for s in states[1:4])
    assert states[4].factor is not states[3].factor


def test_damping_can_be_a_tensor_and_needs_no_refresh():
    toy = problems.mlp()
    opt = fp.kfac(refresh_every=100, start=0)
    state, direction, evidence = problems.update(toy, opt)
    stronger = fp.kfac(damping=torch.tensor(10.0, dtype=torch.float64), refresh_every=100, start=0)
    no_measurement = (NotDue(fp.Every("measure")), NotDue(fp.Every("refresh", 100)))
    later = fp.observe(toy.problem, toy.params, toy.batch, no_measurement)
    _, changed = stronger.update(state, evidence.grads, later)
    assert treemath.norm(changed) < 0.1 * treemath.norm(direction)


def test_a_plain_function_and_its_module_get_the_same_direction():
    results = [
        problems.update(toy, fp.kfac(), 3)[1] for toy in (problems.mlp(), problems.mlp_function())
    ]
    assert_same(*results)


def test_attention_layers_are_found_inside_multihead_attention():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    problem = fp.problem(problems.initialised(Model()), fp.losses.cross_entropy)
    batch = (problems.normal((3, 5, 4)), torch.tensor([0, 1, 2]))
    opt = fp.kfac(labels="empirical")
    state, _, _ = problems.update(problems.Toy(problem, (batch,)), opt)
    assert set(state.representation.left) == {
        "attention.in_proj_weight+attention.in_proj_bias",
        "attention.out_proj.weight+attention.out_proj.bias",
        "head.weight+head.bias",
    }
    assert not state.representation.others


IDS, NEXT = torch.tensor([[0, 3], [2, 2]]), torch.tensor([[1, 2], [0, 4]])


def tied(params, ids):
    return F.linear(F.embedding(ids, params["table"]).tanh(), params["table"])


def test_a_tied_embedding_and_head_are_the_nearest_kronecker_product_to_both_uses():
    params = {"table": problems.normal((5, 3))}
    problem = fp.problem(tied, fp.losses.cross_entropy, params=params)
    opt = fp.kflr(decay=None, damping=0.1)
    evidence = fp.observe(problem, params, (IDS, NEXT), opt.needs(0))
    state, direction = opt.update(opt.init(params), evidence.grads, evidence)

    # The Fisher matrices of what the table gives out, as if that were a parameter itself.
    looked_up = F.embedding(IDS, params["table"])

    def inner(name, model, value):
        free = fp.problem(lambda p, _: model(p[name]), fp.losses.cross_entropy, params={})
        whole = reference.fisher(free, {name: value}, (IDS, NEXT))
        n = value.shape[-1]
        return sum(whole[i : i + n, i : i + n] for i in range(0, len(whole), n))

    of_lookup = inner("e", lambda e: F.linear(e.tanh(), params["table"]), looked_up)
    of_logits = inner("z", lambda z: z, F.linear(looked_up.tanh(), params["table"]))
    frequency = torch.bincount(IDS.reshape(-1), minlength=5) / IDS.numel()
    hidden = looked_up.tanh().reshape(-1, 3)
    total = torch.kron(frequency.double().diag(), of_lookup)
    total += torch.kron(of_logits.diagonal().diag(), hidden.T @ hidden / len(hidden))
    # Van Loan: the nearest square is the first singular pair of the rearranged sum.
    rearranged = total.reshape(5, 3, 5, 3).permute(0, 2, 1, 3).reshape(25, 9)
    u, s, vh = torch.linalg.svd(rearranged)
    nearest = s[0] * torch.kron(u[:, 0].reshape(5, 5).contiguous(), vh[0].reshape(3, 3))
    torch.testing.assert_close(state.representation.block("table"), nearest, rtol=1e-9, atol=1e-12)
    assert_close(direction, dense_solve(nearest, evidence.grads, 0.1), rtol=1e-8)


def matrix_layers(params, ids):
    h = F.embedding(ids, params["table"]) @ params["inner"]
    return F.linear(h.tanh(), params["head"], params["bias"])


def long_axes(kind):
    """A toy with an axis of 5, and shorter ones."""
    if kind == "conv":
        return problems.convnet()
    shapes = {"table": (5, 3), "inner": (3, 4), "head": (5, 4), "bias": (5,)}
    params = {k: problems.normal(shape, i) for i, (k, shape) in enumerate(shapes.items())}
    model, used = (matrix_layers, params) if kind == "head" else (tied, {"table": params["table"]})
    problem = fp.problem(model, fp.losses.cross_entropy, params=used)
    return problems.Toy(problem, ((IDS, NEXT),))


def as_matrix(tree, block):
    """``[W | b]`` of a block's parameters."""
    weight, *bias = block.split("+")
    return torch.cat([tree[weight].flatten(1), *(tree[k].unsqueeze(1) for k in bias)], 1)


@pytest.mark.parametrize("max_dim", [1, 2, 4])
@pytest.mark.parametrize("kind", ["conv", "head"])
@pytest.mark.parametrize("decay", [None, 0.9])
def test_of_a_long_axis_the_diagonal_of_the_factor_is_kept(kind, max_dim, decay):
    toy = long_axes(kind)
    options = {"labels": "exact", "damping_split": "pi", "decay": decay}
    whole, kept = (
        problems.update(toy, fp.kfac(**options, max_dim=n))[0].representation for n in (0, max_dim)
    )
    for full, part in ((whole.left, kept.left), (whole.right, kept.right)):
        for block, factor in full.items():
            expected = square(factor)
            if factor.shape[-1] > max_dim and expected.ndim == 2:
                expected = expected.diagonal()
            torch.testing.assert_close(square(part[block]), expected)


@pytest.mark.parametrize("kind", ["conv", "head", "tied"])
@pytest.mark.parametrize("split", ["joint", "pi"])
def test_diagonal_factors_are_solved_with_as_matrices_are(kind, split):
    toy = long_axes(kind)
    opt = fp.kfac(labels="exact", damping=0.1, damping_split=split, decay=None, max_dim=2)
    state, direction, evidence = problems.update(toy, opt)
    kept = state.representation
    assert any(x.ndim == 1 for x in kept.right.values())
    for block in kept.left:
        g = as_matrix(evidence.grads, block)
        if split == "joint":
            dense = kept.block(block)
            dense = dense + 0.1 * reference.eye(len(dense))
            expected = torch.linalg.solve(dense, g.reshape(-1)).reshape(g.shape)
        else:
            factors = (square(x[block]) for x in (kept.left, kept.right))
            left, right = (x.diag() if x.ndim == 1 else x for x in factors)
            pi = (right.diagonal().mean() / left.diagonal().mean()).sqrt()
            left = left + 0.1**0.5 / pi * reference.eye(len(left))
            right = right + 0.1**0.5 * pi * reference.eye(len(right))
            expected = torch.linalg.solve(left, g) @ torch.linalg.inv(right)
        found = as_matrix(direction, block)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def table_and_head(head):
    """The state of K-FAC for a model whose table is also used by ``head(params, hidden)``."""
    params = {"table": problems.normal((5, 5)), "bias": problems.normal((5,))}
    problem = fp.problem(
        lambda p, ids: head(p, F.embedding(ids, p["table"]).tanh()),
        fp.losses.cross_entropy,
        params=params,
    )
    opt = fp.kflr(decay=None)
    evidence = fp.observe(problem, params, (IDS, NEXT), opt.needs(0))
    state, _ = opt.update(opt.init(params), evidence.grads, evidence)
    return problem, params, state.representation


def test_a_table_that_is_also_a_weight_of_inputs_first_is_left_to_its_diagonal():
    problem, params, kept = table_and_head(lambda p, h: h @ p["table"] + p["bias"])
    diagonal = reference.fisher(problem, params, (IDS, NEXT)).diagonal()[:25].reshape(5, 5)
    torch.testing.assert_close(kept.others["table"], diagonal)


def test_a_tied_head_may_have_a_bias():
    problem, params, kept = table_and_head(lambda p, h: F.linear(h, p["table"], p["bias"]))
    constant = problems.normal((5,))
    _, _, expected = table_and_head(lambda p, h: F.linear(h, p["table"], constant))
    torch.testing.assert_close(kept.block("table"), expected.block("table"))
    dense = reference.fisher(problem, params, (IDS, NEXT))
    torch.testing.assert_close(kept.block("bias"), dense[25:, 25:])


def test_training_batchnorm_keeps_its_statistics_as_values():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    problem = fp.problem(problems.initialised(model), fp.losses.cross_entropy)
    opt = fp.kfac()
    batch = problems.labelled(6, 3, 3, 0)
    evidence = fp.observe(
        problem, problem.params, batch, opt.needs(0), generator=problems.seeded(0)
    )
    opt.update(opt.init(problem.params), evidence.grads, evidence)
    assert int(evidence.buffers["1.num_batches_tracked"]) == 1
    assert int(model[1].num_batches_tracked) == 0


def test_a_partition_gives_it_some_of_the_layers():
    toy = problems.mlp()
    opt = fp.partition([("0.*", "kfac"), ("*", "sgd")], kfac=fp.kfac(), sgd=fp.sgd())
    state, direction, evidence = problems.update(toy, opt)
    assert list(state.inner["kfac"].representation.left) == ["0.weight+0.bias"]
    assert direction["2.weight"] is evidence.grads["2.weight"]


@pytest.mark.parametrize("wrong", [{"labels": "model"}, {"damping_split": "half"}, {"decay": 1.0}])
def test_wrong_options_are_refused_by_name(wrong):
    with pytest.raises(
        ValueError, match=next(iter(wrong.values())) if "decay" not in wrong else "decay"
    ):
        fp.kfac(**wrong)


def test_without_evidence_it_says_what_it_needs():
    toy = problems.mlp()
    with pytest.raises(fp.MissingEvidence, match="LayerStatistics"):
        fp.kfac().update(fp.kfac().init(toy.params), toy.params)
