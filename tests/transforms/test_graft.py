import pytest
import torch
from hypothesis import given

import funcprecond as fp
from tests import strategies
from tests.equality import assert_close, assert_same, finite
from tests.problems import mlp


@given(strategies.vectors())
def test_each_parameter_has_the_length_of_one_and_the_direction_of_the_other(grads):
    opt = fp.graft(fp.shampoo(), fp.chain(fp.sgd(), fp.scale(3.0)))
    state, grafted = opt.update(opt.init(grads), grads)
    _, direction = fp.shampoo().update(fp.shampoo().init(grads), grads)
    for k, g in grads.items():
        d = direction[k]
        assert_close(grafted[k].norm(), 3 * g.norm(), rtol=1e-9)
        assert_close(grafted[k] * d.norm(), d * grafted[k].norm(), rtol=1e-9)


def test_a_constant_gradient_grafted_to_sgd_has_its_norm_at_every_step(randn):
    """X-10."""
    g = {"w": randn(4, 3)}
    opt = fp.graft(fp.caspr(), fp.sgd())
    state = opt.init(g)
    for _ in range(5):
        state, direction = opt.update(state, g)
        assert_close(direction["w"].norm(), g["w"].norm(), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_direction_of_zero_stays_zero(dtype):
    g = {"w": torch.zeros(3, 2, dtype=dtype)}
    opt = fp.graft(fp.shampoo(), fp.sgd())
    _, direction = opt.update(opt.init(g), g)
    assert_same(direction, g)


def test_half_precision_lengths_neither_overflow_nor_vanish():
    for value in (1000.0, 1e-4):
        g = {"w": torch.full((50, 50), value, dtype=torch.float16)}
        opt = fp.graft(fp.adagrad(), fp.sgd())
        _, direction = opt.update(opt.init(g), g)
        assert finite(direction)
        assert_close(direction["w"].double(), g["w"].double(), rtol=1e-2)


def test_it_needs_what_both_need():
    opt = fp.graft(fp.shampoo(refresh_every=2), fp.shampoo(refresh_every=3))
    assert {n.steps for n in opt.needs(0) if n.what == "refresh"} == {2, 3}


def test_before_its_start_it_is_the_other_method():
    toy = mlp()
    opt = fp.graft(fp.shampoo(), fp.adam(), start=2)
    state, adam = opt.init(toy.params), fp.adam().init(toy.params)
    same = []
    for t in range(3):
        evidence = fp.observe(toy.problem, toy.params, toy.at(t), opt.needs(t))
        state, direction = opt.update(state, evidence.grads, evidence)
        adam, expected = fp.adam().update(adam, evidence.grads)
        same.append(torch.equal(direction["0.weight"], expected["0.weight"]))
    assert same == [True, True, False]
