"""Structure, shapes, dtypes and devices are kept; nothing that was passed in is changed."""

import pytest
import torch
from hypothesis import given
from torch.utils._pytree import tree_leaves, tree_structure

import funcprecond as fp
from funcprecond.linalg import treemath
from tests import problems, strategies
from tests.conformance.methods import build, every_method, line, trained
from tests.equality import assert_same, copy, finite
from tests.problems import seeded

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@every_method
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_direction_has_the_parameters_names_shapes_and_dtype(name, dtype):
    toy = problems.mlp(dtype)
    _, direction, _ = problems.update(toy, build(name), steps=2)
    assert list(direction) == list(toy.params)
    for k, p in toy.params.items():
        assert direction[k].shape == p.shape
        assert direction[k].dtype == dtype
        assert direction[k].device == p.device
    assert finite(direction)


@every_method
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_state_keeps_its_structure_shapes_and_dtypes(name, dtype):
    toy = problems.mlp(dtype)
    state1, _, _ = problems.update(toy, build(name), steps=1)
    state2, _, _ = problems.update(toy, build(name), steps=2)
    assert tree_structure(state1) == tree_structure(state2)
    for a, b in zip(tree_leaves(state1), tree_leaves(state2), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


@every_method
def test_the_first_state_has_the_structure_of_all_later_ones(name):
    toy, opt = problems.mlp(), build(name)
    state, _, _ = problems.update(toy, opt, steps=1)
    if not line(name).learns_layers:
        assert tree_structure(opt.init(toy.params)) == tree_structure(state)


@every_method
def test_a_state_holds_tensors_only_and_none_twice(name):
    toy, opt = problems.mlp(), build(name)
    states = [opt.init(toy.params), problems.update(toy, opt, steps=2)[0]]
    for state in states:
        leaves = tree_leaves(state)
        assert all(isinstance(x, torch.Tensor) for x in leaves)
        memory = [x.data_ptr() for x in leaves if x.numel()]
        assert len(memory) == len(set(memory))
        assert not any(x.requires_grad for x in leaves)


@every_method
def test_inputs_and_the_old_state_are_untouched_bit_for_bit(name):
    toy, opt = problems.convnet(), build(name)
    params = copy(toy.params)
    state, _, _ = problems.update(toy, opt, steps=1)
    evidence = fp.observe(toy.problem, params, toy.at(1), opt.needs(1), generator=seeded(1))
    before = copy((state, evidence.grads, params, toy.at(1), toy.problem.buffers))
    opt.update(state, evidence.grads, evidence)
    assert_same((state, evidence.grads, params, toy.at(1), toy.problem.buffers), before)


@every_method
def test_updating_twice_from_one_state_gives_the_same_bits(name):
    toy, opt = problems.convnet(), build(name)
    state, _, _ = problems.update(toy, opt, steps=1)
    evidence = fp.observe(toy.problem, toy.params, toy.at(1), opt.needs(1), generator=seeded(1))
    first = opt.update(state, evidence.grads, evidence)
    assert_same(opt.update(state, evidence.grads, evidence), first)


@every_method
def test_the_same_generator_gives_the_same_run(name):
    toy = problems.mlp()
    runs = [problems.train(toy, trained(name), 3)[:2] for _ in range(2)]
    assert_same(runs[0], runs[1])


@every_method
def test_torchs_global_generator_is_neither_read_nor_moved(name):
    toy, opt = problems.mlp(), build(name)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = problems.update(toy, opt, steps=2)[1]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert_same(problems.update(toy, opt, steps=2)[1], first)


@every_method
def test_the_first_direction_descends(name):
    toy = problems.mlp()
    _, direction, evidence = problems.update(toy, build(name))
    assert treemath.dot(direction, evidence.grads) > 0


@every_method
@given(shapes=strategies.shapes, seed=strategies.seeds, dtype=strategies.dtypes)
def test_any_shapes_give_finite_directions_of_those_shapes(name, shapes, seed, dtype):
    toy = problems.tree(shapes, seed, dtype)
    state, direction, _ = problems.update(toy, build(name), steps=2)
    assert finite((state, direction))
    assert {k: d.shape for k, d in direction.items()} == {k: p.shape for k, p in toy.params.items()}
    assert {d.dtype for d in direction.values()} == {dtype}


@every_method
def test_the_state_knows_nothing_of_the_order_of_the_parameters(name):
    toy, opt = problems.mlp_function(), build(name)
    reverse = dict(reversed(toy.params.items()))
    if opt.needs(0) and any(
        n.draw(toy.problem, toy.params, toy.batch, seeded(0)) != () for n in opt.needs(0)
    ):
        pytest.skip("random numbers are drawn in the order of the parameters")
    _, first, _ = problems.update(toy, opt, steps=2)
    _, second, _ = problems.update(toy, opt, steps=2, params=reverse)
    for k, d in first.items():
        assert torch.allclose(second[k], d, rtol=1e-9, atol=1e-12), k
