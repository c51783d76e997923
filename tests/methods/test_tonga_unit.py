"""TONGA by units against the dense recursion of each unit's matrix."""

import pytest
import torch

import funcprecond as fp
from tests import reference
from tests.conformance.test_absent_layers import full, run
from tests.equality import assert_close, assert_same
from tests.problems import Toy, convnet, mlp, train, update
from tests.representation.test_gram import CASES

OPTIONS = {"damping": 0.05, "decay": 0.9, "rank": 2, "every": 3}


def rows_of(grads, block, shape):
    """The units' gradients of a layer by hand: axis 0 of the weight, or axis 1 (``shape`` > 0)."""
    weight, _, bias = block.partition("+")
    w = grads[weight]
    w = w.reshape(len(w), -1) if not shape else w.reshape(-1, w.shape[-1]).T
    return torch.cat([w, grads[bias].reshape(-1, 1)], 1) if bias else w


def recursion(gradients, lam, decay, rank, every):
    """The last direction of one unit, with dense matrices."""
    c = torch.zeros(len(gradients[0]), len(gradients[0]), dtype=torch.float64)
    for t, g in enumerate(gradients):
        if t % every == 0:
            values, vectors = torch.linalg.eigh(c)
            c = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
        c = decay * c + torch.outer(g, g)
    return torch.linalg.solve(c + lam * reference.eye(len(c)), gradients[-1])


LAYERS = {
    "mlp": {"0.weight+0.bias": 0, "2.weight+2.bias": 0},
    "convnet": {"0.weight+0.bias": 0, "1.weight+1.bias": 0, "4.weight+4.bias": 0},
    "conv2d groups": {"0.weight+0.bias": 0, "3.weight+3.bias": 0},
    "sequence": {"embed.weight": 1, "norm.weight+norm.bias": 0, "head.weight+head.bias": 0},
    "matmul": {"w": 1, "out.weight": 0},
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("steps", [1, 3, 5, 8])
def test_every_unit_is_the_dense_recursion_of_its_gradients(name, steps):
    case = CASES[name]()
    opt = fp.tonga_unit(**OPTIONS)
    params, state, seen, direction = case.params, opt.init(case.params), [], None
    for t in range(steps):
        evidence = fp.observe(case.problem, params, case.at(t), opt.needs(t))
        state, direction = opt.update(state, evidence.grads, evidence)
        params, seen = fp.apply(params, direction, 0.1), [*seen, evidence.grads]
    for block, shape in LAYERS[name].items():
        steps_of = [rows_of(g, block, shape) for g in seen]
        args = [OPTIONS[k] for k in ("damping", "decay", "rank", "every")]
        expected = [recursion([x[o] for x in steps_of], *args) for o in range(len(steps_of[0]))]
        assert_close(rows_of(direction, block, shape), torch.stack(expected), rtol=1e-7)


def test_a_parameter_outside_of_layers_is_one_unit():
    case = CASES["any shapes"]()
    opt = fp.tonga_unit(**OPTIONS)
    state, found, evidence = update(case, opt, 5)
    outside = [k for k, x in state.window.stacked.items() if len(x) == 1]
    assert len(outside) > 3
    for name in outside:
        seen = [fp.observe(case.problem, case.params, case.at(t)).grads[name] for t in range(5)]
        args = (OPTIONS[k] for k in ("damping", "decay", "rank", "every"))
        expected = recursion([g.reshape(-1) for g in seen], *args)
        assert_close(found[name].reshape(-1), expected, rtol=1e-7)


def test_a_layer_of_one_unit_has_the_step_of_tonga():
    model = torch.nn.Linear(3, 1).double()
    case = Toy(
        fp.problem(model, fp.losses.mse),
        tuple((x, y[:, :1].double()) for (x, y) in [(b[0], b[0]) for b in mlp().batches]),
    )
    assert_close(
        train(case, fp.chain(fp.tonga_unit(**OPTIONS), fp.scale(0.1)), 6)[0],
        train(case, fp.chain(fp.tonga(**OPTIONS), fp.scale(0.1)), 6)[0],
        rtol=1e-9,
    )


def test_a_head_without_a_batch_gets_rows_of_zero():
    problem, opt = full(), fp.tonga_unit(**OPTIONS)
    state, direction, _ = run(problem, opt, [0, 1, 0, 1, 1])
    assert not any(x.any() for k, x in direction.items() if k.startswith("heads.0"))
    assert "heads.0.weight+heads.0.bias" in state.window.stacked
    # Rows 2, 3 and 4 have the gradients since the last truncation.
    rows = state.window.stacked["heads.0.weight+heads.0.bias"]
    assert not rows[:, 2:].any()
    assert rows[:, :2].any()


@pytest.mark.parametrize("make", [mlp, convnet])
def test_a_saved_state_loads_into_its_own_model_only(make):
    toy, opt = make(), fp.tonga_unit(**OPTIONS)
    state = train(toy, opt, 4)[1]
    assert_same(fp.from_dict(opt.init(toy.params), fp.to_dict(state)), state)
    other = {k: p.new_zeros(*p.shape, 2) for k, p in toy.params.items()}
    with pytest.raises(ValueError, match="saved rows of '0.weight"):
        fp.from_dict(opt.init(other), fp.to_dict(state))


def test_it_says_what_is_missing_or_wrong():
    opt, g = fp.tonga_unit(), {"x": torch.ones(2)}
    with pytest.raises(fp.MissingEvidence, match="LayerStatistics"):
        opt.update(opt.init(g), g)
    for options, match in (
        ({"damping": 0.0}, "positive"),
        ({"decay": 1.5}, "decay"),
        ({"rank": 0}, "rank"),
        ({"every": 0}, "every"),
    ):
        with pytest.raises(ValueError, match=match):
            fp.tonga_unit(**options)
