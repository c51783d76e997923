"""What scalable Shampoo adds to Shampoo, by composition: SS-2, SS-7, statistics now and then."""

import pytest
import torch

import funcprecond as fp
from funcprecond.transform import stateless
from tests import reference
from tests.equality import assert_close
from tests.linalg.test_blocking import path, stepped
from tests.methods.test_shampoo import EPSILON, applied
from tests.problems import normal

MAGNITUDES = {
    "sgd": fp.sgd,
    "adagrad": fp.adagrad,
    "rmsprop": lambda: fp.adagrad(decay=0.9, damping=1e-8),
    "adam": fp.adam,
    "sqrt_n": lambda: stateless(lambda grads: {k: g.sign() for k, g in grads.items()}),
}


@pytest.mark.parametrize("combine", ["shampoo", "caspr"])
def test_statistics_every_few_steps_are_those_of_these_steps(combine):
    grads = [normal((4, 3), t) for t in range(8)]
    found = path(getattr(fp, combine)(every=3, refresh_every=1, start=0), [{"w": g} for g in grads])
    for t, g in enumerate(grads):
        seen = grads[: t + 1 : 3]
        expected = applied(getattr(reference, combine)(seen, EPSILON), g)
        assert_close(found[t]["w"], expected, rtol=1e-5)


@pytest.mark.parametrize("build", [fp.soap, fp.splus])
def test_statistics_every_few_steps_are_averages_of_these_steps(build):
    grads, beta = [normal((4, 3), t) for t in range(8)], 0.7
    state = stepped(
        build(every=3, refresh_every=1, start=0, decay=beta), [{"w": g} for g in grads]
    )[-1]
    weights = [(1 - beta) * beta ** (2 - i) for i in range(3)]
    expected = sum(w * g @ g.T for w, g in zip(weights, grads[::3], strict=True))
    assert_close(state.statistics["w"][0], expected, rtol=1e-12)


@pytest.mark.parametrize("kind", MAGNITUDES)
def test_the_length_is_of_any_other_method_and_the_direction_shampoos(kind):
    """SS-2, the norm over the whole parameter, also where it is in blocks."""
    grads = [{"w": normal((4, 6), t)} for t in range(5)]
    for options in ({}, {"block": 3}):
        grafted = path(fp.graft(fp.shampoo(**options), MAGNITUDES[kind]()), grads)
        plain = path(fp.shampoo(**options), grads)
        lengths = path(MAGNITUDES[kind](), grads)
        for found, d, m in zip(grafted, plain, lengths, strict=True):
            assert_close(found["w"], d["w"] * (m["w"].norm() / d["w"].norm()), rtol=1e-9)


def test_until_the_warm_up_ends_steps_are_the_other_methods():
    grads = [{"w": normal((4, 3), t)} for t in range(6)]
    found = path(fp.graft(fp.shampoo(refresh_every=2, start=0), fp.adam(), start=3), grads)
    assert_close(found[:3], path(fp.adam(), grads)[:3], rtol=1e-12)
    assert not torch.allclose(found[3]["w"], path(fp.adam(), grads)[3]["w"])


def test_momentum_before_and_after_a_fixed_preconditioner_agree_and_grafted_differ():
    """SS-7."""
    grads = [{"w": normal((4, 3), t)} for t in range(6)]
    fixed = fp.shampoo(every=9, refresh_every=9, start=0)
    after = fp.chain(fixed, fp.momentum(0.9, average=True))

    def before(grads):
        moved = path(fp.momentum(0.9, average=True), grads)
        state = fixed.init(grads[0])
        first, _ = fixed.update(state, grads[0])
        return [fixed.update(first, m, nothing(fixed))[1] for m in moved]

    assert_close(path(after, grads), before(grads), rtol=1e-9)
    grafted = fp.graft(fixed, fp.sgd())
    one = path(fp.chain(grafted, fp.momentum(0.9, average=True)), grads)
    other = path(fp.chain(fp.momentum(0.9, average=True), grafted), grads)
    assert (one[-1]["w"] - other[-1]["w"]).norm() > 1e-3 * one[-1]["w"].norm()


def nothing(opt):
    """Evidence of a step at which nothing is due."""
    return fp.Evidence({}, torch.zeros(()), {}, {}, {}, dict.fromkeys(opt.needs(1), ()))
