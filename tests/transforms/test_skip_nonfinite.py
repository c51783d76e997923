import pytest
import torch

import funcprecond as fp
from tests.equality import assert_same

BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_entry_anywhere_keeps_the_old_state_and_steps_nowhere(bad, randn):
    opt = fp.skip_nonfinite(fp.chain(fp.momentum(), fp.adam()))
    good = {"a": randn(3), "b": randn(2, 2)}
    state, _ = opt.update(opt.init(good), good)
    spoiled = {"a": good["a"], "b": good["b"].index_fill(1, torch.tensor(0), bad)}
    new, direction = opt.update(state, spoiled)
    assert_same(new.inner, state.inner)
    assert not any(d.any() for d in direction.values())
    assert new.skipped == 1


def test_a_direction_that_is_not_finite_is_skipped_too(randn):
    opt = fp.skip_nonfinite(fp.scale(float("inf")))
    state, direction = opt.update(opt.init({"w": randn(2)}), {"w": randn(2)})
    assert state.skipped == 1
    assert not direction["w"].any()


def test_good_steps_are_the_methods_own(randn):
    g = {"w": randn(3, 2)}
    opt = fp.skip_nonfinite(fp.caspr())
    state, direction = opt.update(opt.init(g), g)
    inner, expected = fp.caspr().update(fp.caspr().init(g), g)
    assert_same((state.inner, direction), (inner, expected))
    assert state.skipped == 0


def test_members_of_an_ensemble_are_skipped_one_by_one(randn):
    opt = fp.skip_nonfinite(fp.momentum())
    grads = {"w": torch.stack([randn(3), randn(3) * float("nan"), randn(3)])}
    states = torch.vmap(opt.init)(grads)
    new, direction = torch.vmap(opt.update)(states, grads)
    assert new.skipped.tolist() == [0, 1, 0]
    assert direction["w"].ne(0).all(1).tolist() == [True, False, True]
