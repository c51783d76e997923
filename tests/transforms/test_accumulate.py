import pytest
import torch
from torch import nn

import funcprecond as fp
from tests import problems
from tests.conformance.methods import build, every_method
from tests.equality import assert_close, assert_same, finite
from tests.problems import Toy, normal, seeded


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
    opt = fp.accumulate(fp.shampoo(refresh_every=2, start=0), 2)
    refreshed = [t for t in range(10) if fp.Every("refresh", 2) in opt.needs(t)]
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


def grouped(problem, batches, method=fp.sgd):
    """The direction after one group."""
    opt = fp.accumulate(method(), len(batches))
    state = opt.init(problem.params)
    for t, batch in enumerate(batches):
        evidence = fp.observe(problem, problem.params, batch, opt.needs(t))
        state, direction = opt.update(state, evidence.grads, evidence)
    assert not state.weight
    return direction


WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
MODULES = {
    "mean": nn.CrossEntropyLoss(),
    "ignored": nn.CrossEntropyLoss(ignore_index=0),
    "weighted": nn.CrossEntropyLoss(WEIGHTS, ignore_index=0),
    "smoothed": nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.2, ignore_index=0),
    "nll": nn.NLLLoss(ignore_index=0),
    "weighted nll": nn.NLLLoss(WEIGHTS),
    "sum": nn.CrossEntropyLoss(reduction="sum", ignore_index=0),
    "bce": nn.BCEWithLogitsLoss(WEIGHTS, pos_weight=WEIGHTS),
    "l1": nn.L1Loss(),
}


@pytest.mark.parametrize("name", MODULES)
def test_unequal_batches_equal_one_batch_of_all_examples(name):
    """Against torch's own gradient of the one batch; the third batch has no target that counts."""
    loss, module = MODULES[name], problems.mlp_module()
    if "nll" in name:
        module = nn.Sequential(*module, nn.LogSoftmax(-1))
    x, y = normal((9, 3), 1), torch.arange(9) % 3
    y[2:5] = 0
    targets = normal((9, 3), 2).sigmoid() if name in ("bce", "l1") else y
    expected = torch.autograd.grad(loss(module(x), targets), list(module.parameters()))
    pieces = [slice(0, 2), slice(2, 5), slice(5, 6), slice(6, 9)]
    problem = fp.problem(module, loss)
    direction = grouped(problem, [(x[s], targets[s]) for s in pieces])
    assert_close(list(direction.values()), list(expected), rtol=1e-10)


def test_a_loss_of_ones_own_says_what_it_divides_by():
    def masked(f, y):
        kept = y != 0
        return ((f - y).abs() * kept).sum() / kept.sum()

    module = problems.mlp_module()
    x, y = normal((6, 3), 1), normal((6, 3), 2)
    y[:3, :2], y[4] = 0, 0
    loss = fp.losses.Custom(masked, divisor=lambda f, y: (y != 0).sum())
    direction = grouped(fp.problem(module, loss), [(x[s], y[s]) for s in (slice(2), slice(2, 6))])
    expected = torch.autograd.grad(masked(module(x), y), list(module.parameters()))
    assert_close(list(direction.values()), list(expected), rtol=1e-10)


def test_many_batches_in_half_precision_do_not_lose_the_small_ones():
    module = nn.Linear(1, 1, bias=False).bfloat16()
    problem = fp.problem(module, fp.losses.Custom(lambda f, y: f.sum(), "sum"))
    batches = [(torch.ones(1, 1).bfloat16(), torch.ones(1))] * 300
    assert grouped(problem, batches)["weight"].item() == 300


def test_the_weight_of_a_batch_was_not_asked_for():
    toy, opt = problems.mlp(), fp.accumulate(fp.sgd(), 2)
    evidence = fp.observe(toy.problem, toy.params, toy.batch)
    with pytest.raises(fp.MissingEvidence, match="BatchWeight.*was not measured"):
        opt.update(opt.init(toy.params), evidence.grads, evidence)
