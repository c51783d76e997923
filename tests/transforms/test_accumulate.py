import pytest

import funcprecond as fp
from tests import problems
from tests.conformance.methods import build, every_method
from tests.equality import assert_close, assert_same, finite
from tests.problems import Toy, seeded


def halves(toy: Toy) -> Toy:
    """Each batch as two of half its size."""
    batches = []
    for inputs, targets in toy.batches:
        n = len(inputs) // 2
        batches += [(inputs[:n], targets[:n]), (inputs[n:], targets[n:])]
    return Toy(toy.problem, tuple(batches))


@pytest.mark.parametrize("method", [fp.sgd, fp.adam, fp.adagrad, fp.shampoo, fp.caspr])
def test_two_half_batches_equal_the_whole_batch(method):
    toy = problems.mlp(examples=6)
    opt = fp.chain(method(), fp.scale(0.1))
    whole, _, _ = problems.train(toy, opt, 3)
    split, _, _ = problems.train(halves(toy), fp.accumulate(opt, 2), 6)
    assert_close(split, whole, rtol=1e-6)


def test_between_updates_the_direction_is_zero_and_the_inner_state_stays():
    toy, opt = problems.mlp(), fp.accumulate(fp.adam(), 3)
    state = opt.init(toy.params)
    for t in range(2):
        evidence = fp.observe(toy.problem, toy.params, toy.at(t), opt.needs(t))
        new, direction = opt.update(state, evidence.grads, evidence)
        assert not any(d.any() for d in direction.values())
        assert_same(new.inner, state.inner)
        state = new


def test_one_step_is_the_method_itself():
    toy = problems.mlp()
    alone = problems.train(toy, fp.chain(fp.adam(), fp.scale(0.1)), 3)
    wrapped = problems.train(toy, fp.accumulate(fp.chain(fp.adam(), fp.scale(0.1)), 1), 3)
    assert_close(wrapped[0], alone[0], rtol=1e-13)


def test_inner_intervals_count_groups():
    opt = fp.accumulate(fp.shampoo(refresh_every=2), 2)
    refreshed = [t for t in range(10) if any(n.what == "refresh" for n in opt.needs(t))]
    assert refreshed == [1, 5, 9]


def test_a_bad_batch_spoils_its_own_group_only():
    toy, opt = problems.mlp(), fp.accumulate(fp.skip_nonfinite(fp.sgd()), 2)
    state, directions = opt.init(toy.params), []
    for t in range(4):
        inputs, targets = toy.at(t)
        batch = (inputs * float("nan") if t == 0 else inputs, targets)
        evidence = fp.observe(toy.problem, toy.params, batch, opt.needs(t))
        state, direction = opt.update(state, evidence.grads, evidence)
        directions.append(direction)
    assert all(finite(d) for d in directions)
    assert directions[3]["0.weight"].any()


def test_without_evidence_it_says_what_is_missing(randn):
    opt = fp.accumulate(fp.sgd(), 2)
    with pytest.raises(fp.MissingEvidence):
        opt.update(opt.init({"w": randn(2)}), {"w": randn(2)})


def test_a_group_of_none_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        fp.accumulate(fp.sgd(), 0)


@every_method
def test_a_group_of_one_batch_is_that_batch(name):
    """Accumulating a batch twice is the same as seeing it once, whatever the method measures."""
    toy, opt = problems.mlp(), build(name)
    evidence = fp.observe(toy.problem, toy.params, toy.batch, opt.needs(0), generator=seeded(3))
    _, expected = opt.update(opt.init(toy.params), evidence.grads, evidence)
    twice = fp.accumulate(opt, 2)
    state = twice.init(toy.params)
    for t in range(2):
        evidence = fp.observe(
            toy.problem, toy.params, toy.batch, twice.needs(t), generator=seeded(3)
        )
        state, direction = twice.update(state, evidence.grads, evidence)
    assert_close(direction, expected, rtol=1e-9)
