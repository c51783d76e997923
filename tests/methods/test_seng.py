"""SENG against dense natural gradients of each layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import funcprecond as fp
from funcprecond.layers.example_gradients import ExampleGradients
from funcprecond.layers.sketched_rows import columns, leading_positions
from tests import reference
from tests.conformance.test_absent_layers import full as heads
from tests.conformance.test_absent_layers import run
from tests.equality import assert_close, assert_same
from tests.problems import (
    Toy,
    convnet,
    initialised,
    labelled,
    mlp,
    normal,
    regression,
    seeded,
    train,
    update,
)
from tests.representation.test_gram import CASES, dense, labels, toy

LAM = 0.07
ALL = {"damping": LAM, "sketch": 1000, "rank": 1000}


def by_parameter(rows, params):
    """The columns of (R, P) rows that belong to each parameter."""
    sizes = [p.numel() for p in params.values()]
    return dict(zip(params, rows.split(sizes, 1), strict=True))


def solved(case, state, rows, grads, lam=LAM, scale=1.0):
    """``(UᵀU + λ I)⁻¹ g`` for each block of a state, and division where there is a diagonal."""
    own, found = by_parameter(rows, case.params), {}
    for block in state.gram.counts:
        names = [k for k in block.split("+") if k]
        if block in state.gram.others:
            found[block] = grads[block] / (own[block].square().sum(0).view_as(grads[block]) + lam)
            continue
        u = torch.cat([own[k] for k in names], 1)
        g = torch.cat([grads[k].reshape(-1) for k in names])
        d = torch.linalg.solve(scale * u.T @ u + lam * reference.eye(len(g)), g)
        found |= reference.unravel(d, {k: grads[k] for k in names})
    return {k: found[k] for k in grads if k in found}


@pytest.mark.parametrize("name", [k for k in CASES if k != "any shapes"])
@pytest.mark.filterwarnings("ignore:parameter")
def test_without_a_sketch_it_is_the_dense_natural_gradient_of_each_layer(name):
    case = CASES[name]()
    state, direction, evidence = update(case, fp.seng(**ALL))
    expected = solved(case, state, dense(case), evidence.grads)
    assert_close({k: direction[k] for k in expected}, expected, rtol=1e-8)
    assert {k for k in case.params if evidence.grads[k].any()} <= expected.keys()


@pytest.mark.parametrize("name", ["conv1d", "conv2d groups", "conv3d", "long sequence"])
def test_layers_of_many_positions_are_formed_or_keep_as_many_as_their_rank(name):
    case = CASES[name]()
    _, expected, _ = update(case, fp.seng(**ALL))
    # The rows are formed if they are short. If not, output gradients of at most 12 channels have at
    # most the rank 12.
    for options in ({"rank": 1, "sketch": 1000}, {"rank": 12, "sketch": 13}):
        state, direction, _ = update(case, fp.seng(damping=LAM, **options))
        assert bool(state.gram.formed) or options["rank"] == 12
        cut = {k for block in state.gram.chosen_right for k in block.split("+")}
        whole = [k for k in direction if k not in cut]
        assert_close({k: direction[k] for k in whole}, {k: expected[k] for k in whole}, rtol=1e-7)


def test_a_network_of_one_layer_has_the_step_of_smw_ng():
    case = toy(nn.Linear(3, 3), normal((4, 3)), labels((4,)))
    _, expected, _ = update(case, fp.smw_ng(damping=LAM))
    assert_close(update(case, fp.seng(**ALL))[1], expected, rtol=1e-9)


@pytest.mark.parametrize("make", [mlp, convnet, regression])
def test_exact_labels_give_the_gauss_newton_step_of_each_layer(make):
    case = make()
    state, direction, evidence = update(case, fp.seng(labels="exact", **ALL))
    matrix = reference.ggn(case.problem, case.params, case.batch)
    values, vectors = torch.linalg.eigh(matrix)
    rows = values.clamp_min(0).sqrt().unsqueeze(1) * vectors.T
    assert_close(direction, solved(case, state, rows, evidence.grads), rtol=1e-7)


# ------------------------------------------------------------------------------------ truncation
@pytest.mark.parametrize(("positions", "outputs"), [(9, 3), (4, 7), (6, 6)])
def test_positions_are_combined_by_the_singular_vectors_of_the_output_gradients(positions, outputs):
    g, a = normal((1, 1, 5, positions, outputs)), normal((1, 5, positions, 4), 1)
    rows = ExampleGradients(a, g, "w", None, (outputs, 4), False)
    whole = torch.einsum("nto,nti->noi", g[0, 0], a[0])
    u, s, vh = torch.linalg.svd(g[0, 0].mT, full_matrices=False)
    for rank in (1, 2, min(positions, outputs)):
        found = leading_positions(rows, rank)
        assert found.inputs.shape == (1, 5, rank, 4)
        # The released program's: (u s)_r (a v)_r.
        kept = (u * s.unsqueeze(1))[..., :rank] @ (vh @ a[0])[:, :rank]
        assert_close(found.matrices()[0, :, 0], kept, rtol=1e-9)
    assert_close(kept, whole, rtol=1e-9)


# ---------------------------------------------------------------------------------------- sketch
@given(st.integers(1, 9), st.integers(0, 40))
def test_a_sketch_takes_every_column_as_often_in_the_mean(size, more):
    total = size + more
    # The mean over a fine grid of uniform numbers, which hits all parts alike.
    grid = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    drawn = torch.stack([columns(total, u.expand(size)) for u in grid])
    assert drawn.min() >= 0
    assert drawn.max() < total
    share = drawn.flatten().bincount(minlength=total) / len(grid)
    torch.testing.assert_close(share, torch.full_like(share, size / total), rtol=0, atol=4e-3)
    assert (drawn[:, 1:] >= drawn[:, :-1]).all()


def wide(dtype=torch.float64):
    model = nn.Sequential(nn.Linear(11, 9), nn.Tanh(), nn.Linear(9, 3))
    batches = tuple(labelled(5, 11, 3, 10 * i, dtype) for i in range(4))
    return Toy(fp.problem(initialised(model, dtype=dtype), fp.losses.cross_entropy), batches)


def sketched(case, state, block, rows):
    """U S of a layer, from the definition: the chosen columns of every G_n, times a root each."""
    gram, own = state.gram, by_parameter(rows, case.params)
    weight, bias = block.split("+")
    o, i = case.params[weight].shape
    g = torch.cat([own[weight].reshape(-1, o, i), own[bias].reshape(-1, o, 1)], 2)
    left = gram.chosen_left.get(block, torch.arange(o))
    right = gram.chosen_right.get(block, torch.arange(i + 1))
    scale = (o / len(left) * (i + 1) / len(right)) ** 0.5
    return g.flatten(1), lambda x: scale * x.reshape(-1, o, i + 1)[:, left][..., right].flatten(1)


def test_a_sketched_step_is_the_dense_sketched_solve():
    case = wide()
    state, direction, evidence = update(case, fp.seng(damping=LAM, sketch=4))
    assert set(state.gram.chosen_left) == {"0.weight+0.bias"}
    assert len(state.gram.chosen_right) == 2
    for block in state.gram.counts:
        u, pick = sketched(case, state, block, dense(case))
        weight, bias = block.split("+")
        g = torch.cat([evidence.grads[weight], evidence.grads[bias][:, None]], 1).reshape(-1)
        few = pick(u)
        inner = torch.linalg.solve(
            LAM * reference.eye(len(u)) + few @ few.T, few @ pick(g[None])[0]
        )
        d = ((g - u.T @ inner) / LAM).reshape(len(evidence.grads[bias]), -1)
        assert_close(direction[weight], d[:, :-1], rtol=1e-8)
        assert_close(direction[bias], d[:, -1], rtol=1e-8)


def test_the_sketch_is_unbiased():
    """The mean of the sketched Gram matrix over many draws, within four standard errors."""
    case = wide()
    u = dense(case)
    found = {}
    for seed in range(400):
        need = fp.seng(sketch=4).needs(0)[:2]
        evidence = fp.observe(case.problem, case.params, case.batch, need, generator=seeded(seed))
        gram = fp.seng(sketch=4).init(case.params).gram
        gram = gram.accumulate(evidence[need[0]], case.params, evidence[need[1]], size=4)
        for block in gram.counts:
            rows = gram.rows(block, case.params)
            found.setdefault(block, []).append((rows.gram(), rows.matvec(case.params)))
    own = by_parameter(u, case.params)
    for block, draws in found.items():
        names = block.split("+")
        x = torch.cat([own[k] for k in names], 1)
        theta = torch.cat([case.params[k].reshape(-1) for k in names])
        for values, expected in zip(zip(*draws, strict=True), (x @ x.T, x @ theta), strict=True):
            stacked = torch.stack(values)
            error = stacked.std(0) / len(draws) ** 0.5
            assert ((stacked.mean(0) - expected).abs() < 4 * error + 1e-12).all()
            assert (error < 0.2 * expected.abs().max()).all()


def test_random_numbers_are_needed_only_for_what_is_sketched():
    case = wide()
    opt = fp.seng(sketch=12)
    evidence = fp.observe(case.problem, case.params, case.batch, opt.needs(0))
    opt.update(opt.init(case.params), evidence.grads, evidence)
    with pytest.raises(ValueError, match="generator"):
        fp.observe(case.problem, case.params, case.batch, fp.seng(sketch=11).needs(0))


# ---------------------------------------------------------------------------- intervals and windows
def test_between_measurements_the_old_rows_serve_new_gradients():
    case = wide()
    opt = fp.seng(damping=LAM, sketch=4, every=3, start=1)
    state, _, _ = update(case, opt)
    for t in (1, 2):
        evidence = fp.observe(case.problem, case.params, case.at(t), opt.needs(t))
        later, direction = opt.update(state, evidence.grads, evidence)
        assert_same(later, state)
        first = fp.observe(case.problem, case.params, case.batch, opt.needs(0), generator=seeded(0))
        _, expected = opt.update(opt.init(case.params), evidence.grads, first)
        assert_close(direction, expected, rtol=1e-12)


@pytest.mark.parametrize("make", [mlp, convnet])
@pytest.mark.parametrize("window", [1, 3])
def test_the_matrix_is_the_mean_over_the_window(make, window):
    case = make()
    opt = fp.seng(window=window, **ALL)
    state, shapes = opt.init(case.params), None
    for t in range(5):
        needs = opt.needs(t)
        evidence = fp.observe(case.problem, case.params, case.at(t), needs)
        state, direction = opt.update(state, evidence.grads, evidence)
        batches = [case.at(s) for s in range(max(0, t + 1 - window), t + 1)]
        rows = torch.cat([dense(Toy(case.problem, (b,))) for b in batches]) / len(batches) ** 0.5
        assert_close(direction, solved(case, state, rows, evidence.grads), rtol=1e-8)
        now = fp.tree.map(lambda x: torch.tensor(x.shape), state)
        if shapes is not None:
            assert_same(now, shapes)
        shapes = now


def test_a_window_takes_sequences_of_several_lengths():
    model, opt = CASES["sequence"]().problem, fp.seng(window=2, **ALL)
    batches = [(labels((4, n), 5, seed=n), labels((4, n))) for n in (3, 5, 2)]
    case = Toy(model, tuple(batches))
    state, direction, evidence = update(case, opt, 3)
    rows = torch.cat([dense(Toy(model, (b,))) for b in batches[1:]]) / 2**0.5
    assert_close(direction, solved(case, state, rows, evidence.grads), rtol=1e-8)


@settings(max_examples=10)
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([3, 1000]))
def test_a_run_resumes_bit_for_bit(stop, window, sketch):
    case = wide()
    opt = fp.chain(
        fp.seng(damping=0.5, sketch=sketch, window=window, every=2, start=1), fp.scale(0.1)
    )
    params, state, _ = train(case, opt, stop)
    state = fp.from_dict(opt.init(case.params), fp.to_dict(state))
    found = train(case, opt, 4, params=params, state=state, start=stop)
    assert_same(found[:2], train(case, opt, 4)[:2])


def test_a_state_of_another_model_is_refused():
    case, opt = wide(), fp.seng()
    flat = fp.to_dict(update(case, opt)[0])
    small = initialised(nn.Sequential(nn.Linear(10, 9), nn.Tanh(), nn.Linear(9, 3)))
    with pytest.raises(ValueError, match=r"rows of '0.weight\+0.bias' do not fit"):
        fp.from_dict(opt.init(dict(small.named_parameters())), flat)
    with pytest.raises(ValueError, match=r"another model: it has \['2.bias'"):
        fp.from_dict(opt.init({k: p for k, p in case.params.items() if k[0] == "0"}), flat)


# -------------------------------------------------------------------------------------- the rest
def test_a_batch_norm_in_training_mode_is_preconditioned_as_well():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    case = Toy(fp.problem(initialised(model), fp.losses.cross_entropy), (labelled(5, 3, 3, 0),))
    state, direction, _ = update(case, fp.seng(damping=LAM))
    assert {k.split(".")[0] for k in state.gram.weights} == {"0", "1", "3"}
    assert all(x.isfinite().all() for x in direction.values())


def test_float32_keeps_float32_and_learns():
    case = Toy(wide(torch.float32).problem, wide(torch.float32).batches[:1])
    opt = fp.chain(fp.seng(damping=0.1, sketch=8), fp.scale(0.2))
    params, _, evidence = train(case, opt, 40)
    assert {x.dtype for x in params.values()} == {torch.float32}
    _, _, before = update(case, opt)
    assert evidence.loss < 0.3 * before.loss


def test_it_says_what_is_missing_or_wrong():
    opt, g = fp.seng(), {"x": torch.ones(2)}
    with pytest.raises(fp.MissingEvidence, match="LayerStatistics"):
        opt.update(opt.init(g), g)
    for options, match in (
        ({"damping": 0.0}, "positive"),
        ({"sketch": 0}, "sketch"),
        ({"rank": 0}, "rank"),
        ({"window": 0}, "window"),
        ({"labels": "all"}, "labels"),
        ({"every": 0}, "every"),
    ):
        with pytest.raises(ValueError, match=match):
            fp.seng(**options)


def test_a_scale_that_is_a_number_is_a_block_of_its_own():
    x, y = normal((4, 3)), normal((4, 3), 1)
    params = {"s": torch.tensor(0.7, dtype=torch.float64)}
    problem = fp.problem(lambda p, x: torch.tanh(x * p["s"]), fp.losses.mse, params=params)
    case = Toy(problem, ((x, y),))
    state, direction, evidence = update(case, fp.seng(damping=LAM))
    assert_close(direction, solved(case, state, dense(case), evidence.grads), rtol=1e-9)


@pytest.mark.parametrize("window", [1, 2])
def test_a_head_keeps_its_rows_while_batches_leave_it_out(window):
    problem, opt = heads(), fp.seng(damping=0.1, window=window)
    before, after = (run(problem, opt, tasks)[0] for tasks in ([0, 1, 0, 1], [0, 1, 0, 1, 0]))
    kept = {k: x for k, x in fp.to_dict(before).items() if "s.1." in k}
    assert len(kept) > 5
    assert_same({k: fp.to_dict(after)[k] for k in kept}, kept)
    restored = fp.from_dict(opt.init(problem.params), fp.to_dict(before))
    again = run(problem, opt, [0, 1, 0, 1, 0], state=restored, start=4)
    assert_same(again[0], after)
