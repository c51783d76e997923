"""The functional interface of torchopt: compared with torchopt where it is installed."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

import funcprecond as fp
from tests.equality import assert_close, assert_same, copy
from tests.optim.loops import TOY
from tests.problems import normal, seeded

TREES = {
    "dict": lambda i: {"w": normal((3, 2), i), "b": normal((3,), i + 50)},
    "nest": lambda i: ({"layers": [normal((2, 2), i), (normal((2,), i + 50),)]}, normal((), i)),
    "tensor": lambda i: normal((3, 2), i),
    "with None": lambda i: [normal((2,), i), None],
}
shaped = pytest.mark.parametrize("tree", list(TREES.values()), ids=list(TREES))


def run(opt, apply, tree, steps=4):
    params = tree(0)
    state = opt.init(params)
    for t in range(steps):
        updates, state = opt.update(tree(t + 1), state, params=params, inplace=False)
        params = apply(params, updates, inplace=False)
    return params


PAIRS = {
    "sgd": lambda t: (
        t.sgd(lr=0.1, momentum=0.9),
        fp.chain(fp.sgd(), fp.momentum(0.9), fp.scale(0.1)),
    ),
    "adam": lambda t: (t.adam(lr=0.1), fp.chain(fp.adam(), fp.scale(0.1))),
    "adamw": lambda t: (
        t.adamw(lr=0.1, weight_decay=0.2),
        fp.chain(fp.adamw(weight_decay=0.2), fp.scale(0.1)),
    ),
}


@pytest.mark.skipif(importlib.util.find_spec("torchopt") is None, reason="no torchopt")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tree", [TREES[k] for k in ("dict", "nest", "tensor")])
@pytest.mark.parametrize("name", list(PAIRS))
def test_the_steps_are_those_of_torchopt(name, tree):
    import torchopt

    theirs, ours = PAIRS[name](torchopt)
    opt = fp.optim.gradient_transformation(ours)
    found = run(opt, fp.optim.apply_updates, tree)
    # Torchopt corrects the bias of Adam in float32.
    assert_close(found, run(theirs, torchopt.apply_updates, tree), 3e-5)
    # Either function adds the updates of the other.
    assert_same(found, run(opt, torchopt.apply_updates, tree))


@shaped
def test_trees_are_flat_dicts_inside(tree):
    method = fp.chain(fp.shampoo(refresh_every=2), fp.weight_decay(0.1), fp.scale(0.1))
    found = run(fp.optim.gradient_transformation(method), fp.optim.apply_updates, tree)

    def flat(i):
        leaves = fp.tree.leaves(tree(i))
        return {str(k): x for k, x in enumerate(leaves) if x is not None}

    params = flat(0)
    state = method.init(params)
    for t in range(4):
        marks = dict.fromkeys(method.needs(t), ())
        evidence = fp.Evidence(params, torch.zeros(()), None, {}, {}, marks)
        state, direction = method.update(state, flat(t + 1), evidence)
        params = fp.apply(params, direction)
    assert_same([x for x in fp.tree.leaves(found) if x is not None], list(params.values()))


def test_nothing_changes_but_what_is_asked_for():
    opt = fp.optim.gradient_transformation(fp.chain(fp.adam(), fp.scale(0.1)))
    params, grads = TREES["dict"](0), TREES["dict"](1)
    state = opt.init(params)
    before = copy((params, grads, state))
    updates, _ = opt.update(grads, state, params=params, inplace=True)
    assert_same((params, grads, state), before)
    kept = fp.optim.apply_updates(params, updates)
    assert kept["w"] is params["w"]
    assert_close(params["w"], before[0]["w"] + updates["w"])


def test_kfac_takes_its_evidence():
    method = fp.chain(fp.kfac(damping=0.1, every=2, refresh_every=2), fp.scale(0.1))
    opt, g = fp.optim.gradient_transformation(method), seeded(0)
    params = TOY.params
    state = opt.init(params)
    expected, other, h = TOY.params, method.init(TOY.params), seeded(0)
    for t in range(3):
        evidence = fp.observe(TOY.problem, params, TOY.at(t), opt.needs(state), generator=g)
        updates, state = opt.update(evidence.grads, state, params=params, evidence=evidence)
        params = fp.optim.apply_updates(params, updates, inplace=False)
        own = fp.observe(TOY.problem, expected, TOY.at(t), method.needs(t), generator=h)
        other, direction = method.update(other, own.grads, own)
        expected = fp.apply(expected, direction)
    assert_same(params, expected)
    with pytest.raises(fp.MissingEvidence):
        opt.update(evidence.grads, opt.init(params), params=params)


def test_decay_without_parameters_is_an_error():
    opt = fp.optim.gradient_transformation(fp.chain(fp.sgd(), fp.weight_decay(0.1)))
    params = TREES["dict"](0)
    with pytest.raises(fp.MissingEvidence, match=r"'w' itself.*params=params"):
        opt.update(params, opt.init(params))


def test_a_whole_training_step_is_vmapped():
    opt = fp.optim.gradient_transformation(fp.chain(fp.caspr(), fp.scale(0.05)))
    x, y = TOY.batch

    def step(params, state):
        grads = torch.func.grad(lambda p: F.cross_entropy(TOY.problem(p, x), y))(params)
        updates, state = opt.update(grads, state, params=params, inplace=False)
        return fp.optim.apply_updates(params, updates, inplace=False), state

    members = [{k: s * p for k, p in TOY.params.items()} for s in (0.5, 1.0)]
    stacked = {k: torch.stack([m[k] for m in members]) for k in TOY.params}
    states = torch.vmap(opt.init)(stacked)
    for _ in range(2):
        stacked, states = torch.vmap(step)(stacked, states)
    for i, params in enumerate(members):
        state = opt.init(params)
        for _ in range(2):
            params, state = step(params, state)
        assert_close({k: x[i] for k, x in stacked.items()}, params, 1e-9)


def test_the_state_is_saved_and_loaded(tmp_path):
    opt = fp.optim.gradient_transformation(fp.chain(fp.adam(), fp.scale(0.1)))
    params = TREES["nest"](0)
    _, state = opt.update(TREES["nest"](1), opt.init(params), params=params)
    fp.save(tmp_path / "state.pt", state.inner)
    assert_same(fp.load(tmp_path / "state.pt", opt.init(params).inner), state.inner)
