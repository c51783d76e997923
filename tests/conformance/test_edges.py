"""What a training run meets on its bad days: documented results or clear errors."""

import pytest
import torch

import funcprecond as fp
from tests import problems
from tests.conformance.methods import build, every_method, line, trained
from tests.equality import assert_same, copy, finite
from tests.problems import Toy, seeded


def observe(toy: Toy, params, batch, needs, t: int = 0):
    return fp.observe(toy.problem, params, batch, needs, generator=seeded(t))


@every_method
def test_parameters_of_every_number_of_axes_are_trained(name):
    toy = problems.tree()
    params, state, _ = problems.train(toy, trained(name), 3)
    assert finite((params, state))
    assert {k: p.shape for k, p in params.items()} == {k: p.shape for k, p in toy.params.items()}
    assert all(not torch.equal(p, toy.params[k]) for k, p in params.items())


@every_method
def test_a_gradient_of_zero_gives_a_direction_of_zero(name):
    start = problems.regression()
    inputs = start.batch[0]
    toy = Toy(start.problem, ((inputs, start.problem(start.params, inputs)),))
    state, direction, evidence = problems.update(toy, build(name), steps=2)
    assert not any(g.any() for g in evidence.grads.values())
    assert not any(d.any() for d in direction.values())
    assert finite(state)


@every_method
def test_a_gradient_of_zero_after_others_is_finite(name):
    toy, opt = problems.regression(), build(name)
    state, _, _ = problems.update(toy, opt, steps=2)
    inputs = toy.batch[0]
    still = (inputs, toy.problem(toy.params, inputs))
    evidence = observe(toy, toy.params, still, opt.needs(2))
    assert finite(opt.update(state, evidence.grads, evidence))


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_batch_under_skip_nonfinite_changes_nothing(name, bad):
    toy, opt = problems.mlp(), fp.skip_nonfinite(build(name))
    state, _, _ = problems.update(toy, opt, steps=2)
    inputs, targets = toy.batch
    batch = (torch.full_like(inputs, bad), targets)
    evidence = observe(toy, toy.params, batch, opt.needs(2), 2)
    new, direction = opt.update(state, evidence.grads, evidence)
    assert not all(torch.isfinite(g).all() for g in evidence.grads.values())
    assert_same(new.inner, state.inner)
    assert new.skipped == state.skipped + 1
    assert not any(d.any() for d in direction.values())


@every_method
def test_a_run_goes_on_after_a_bad_batch_as_if_it_had_not_been(name):
    toy, opt = problems.mlp(), fp.skip_nonfinite(build(name))
    state, _, _ = problems.update(toy, opt, steps=2)
    inputs, targets = toy.batch
    bad = observe(toy, toy.params, (inputs * float("nan"), targets), opt.needs(2), 2)
    after, _ = opt.update(state, bad.grads, bad)
    good = observe(toy, toy.params, toy.at(2), opt.needs(2), 2)
    first, second = (opt.update(s, good.grads, good) for s in (state, after))
    assert_same(first[1], second[1])
    assert_same(first[0].inner, second[0].inner)


@every_method
def test_a_first_batch_that_is_bad_under_skip_nonfinite_takes_no_step(name):
    toy, opt = problems.mlp(), fp.skip_nonfinite(build(name))
    state = opt.init(toy.params)
    inputs, targets = toy.batch
    evidence = observe(toy, toy.params, (inputs * float("nan"), targets), opt.needs(0))
    new, direction = opt.update(state, evidence.grads, evidence)
    assert not any(d.any() for d in direction.values())
    if not line(name).learns_layers:  # documented: those have no state to keep yet
        assert_same(new.inner, state.inner)


@every_method
def test_an_empty_batch_is_an_error_that_says_so_and_the_state_lives_on(name):
    toy, opt = problems.mlp(), build(name)
    state, _, _ = problems.update(toy, opt, steps=1)
    before = copy(state)
    inputs, targets = toy.batch
    with pytest.raises(ValueError, match="at least one"):
        observe(toy, toy.params, (inputs[:0], targets[:0]), opt.needs(1))
    evidence = observe(toy, toy.params, toy.at(1), opt.needs(1))
    assert finite(opt.update(state, evidence.grads, evidence))
    assert_same(state, before)


@every_method
def test_a_parameter_that_the_loss_does_not_use_stays(name):
    start = problems.mlp_function()
    unused = {"unused": problems.normal((2, 3)), "unused vector": problems.normal((4,))}
    forward = start.problem.forward
    problem = fp.problem(
        lambda p, x: forward(p, {}, x)[0],
        start.problem.loss,
        params={**start.params, **unused},
    )
    toy = Toy(problem, start.batches)
    params, state, _ = problems.train(toy, trained(name), 3)
    assert finite((params, state))
    assert_same({k: params[k] for k in unused}, unused)


@every_method
def test_a_batch_of_one_example_is_enough(name):
    params, state, _ = problems.train(problems.mlp(examples=1), trained(name), 3)
    assert finite((params, state))


@every_method
def test_frozen_parameters_are_no_parameters(name):
    module = problems.mlp_module()
    module[0].weight.requires_grad_(False)
    frozen = module[0].weight.clone()
    toy = Toy(fp.problem(module, fp.losses.cross_entropy), problems.mlp().batches)
    params, _, _ = problems.train(toy, trained(name), 2)
    assert "0.weight" not in params
    assert torch.equal(module[0].weight, frozen)


@every_method
def test_update_without_needed_evidence_says_what_is_missing(name):
    toy, opt = problems.mlp(), build(name)
    evidence = fp.observe(toy.problem, toy.params, toy.batch)
    if any(type(n) is not fp.Every for n in opt.needs(0)):
        with pytest.raises(fp.MissingEvidence):
            opt.update(opt.init(toy.params), evidence.grads)
    elif name != "adamw":
        _, direction = opt.update(opt.init(toy.params), evidence.grads)
        assert finite(direction)


@every_method
def test_chain_graft_and_partition_accept_it(name):
    toy = problems.mlp()
    routed = fp.partition([("0.*", "first"), ("*", "second")], first=build(name), second=fp.sgd())
    opt = fp.chain(fp.clip_norm(1.0), fp.graft(routed, fp.sgd()), fp.momentum(), fp.scale(0.1))
    params, state, evidence = problems.train(toy, opt, 2)
    assert finite((params, state))


@every_method
def test_accumulate_accepts_it(name):
    toy = problems.mlp()
    params, state, _ = problems.train(toy, fp.accumulate(trained(name), 2), 4)
    assert finite((params, state))
    assert not torch.equal(params["0.weight"], toy.params["0.weight"])


@every_method
def test_a_gradient_that_is_none_is_refused_by_name(name):
    toy, opt = problems.mlp(), build(name)
    evidence = fp.observe(
        toy.problem, toy.params, toy.batch, opt.needs(0), generator=problems.seeded(0)
    )
    grads = evidence.grads | {"0.bias": None}
    state = opt.init(toy.params)
    with pytest.raises(ValueError, match=r"gradient of \['0.bias'\] is None.*zeros_like"):
        opt.update(state, grads, evidence)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda opt: fp.chain(fp.clip_norm(1.0), opt),
        lambda opt: fp.chain(fp.scale(0.1), opt),
        lambda opt: fp.chain(fp.weight_decay(0.1), opt),
        lambda opt: fp.chain(fp.momentum(0.9), opt),
        lambda opt: fp.graft(opt, fp.sgd()),
        lambda opt: fp.accumulate(opt, 2),
        fp.skip_nonfinite,
        lambda opt: fp.partition([("*weight", "a"), ("*", "b")], a=opt, b=fp.sgd()),
    ],
)
def test_every_transform_refuses_a_gradient_that_is_none_or_left_out(wrap):
    toy, opt = problems.mlp(), wrap(fp.adam())
    evidence = fp.observe(toy.problem, toy.params, toy.batch, opt.needs(0))
    state = opt.init(toy.params)
    with pytest.raises(ValueError, match=r"gradient of \['0.bias'\] is None.*zeros_like"):
        opt.update(state, evidence.grads | {"0.bias": None}, evidence)
    without = {k: g for k, g in evidence.grads.items() if k != "0.bias"}
    with pytest.raises(ValueError, match=r"\['0.bias'\], which the gradient lacks"):
        opt.update(state, without, evidence)
