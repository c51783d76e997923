"""What an update is told: what was asked for, which gradient was measured, whose state it is."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import funcprecond as fp
from tests import problems
from tests.conformance.methods import build, every_method, intervals
from tests.equality import assert_close, assert_same
from tests.problems import Toy, seeded

WRAPPED = {
    "alone": lambda opt: opt,
    "chain": lambda opt: fp.chain(fp.clip_norm(1.0), opt, fp.scale(0.1)),
    "partition": lambda opt: fp.partition([("0.*", "a"), ("*", "b")], a=opt, b=fp.sgd()),
    "graft": lambda opt: fp.graft(opt, fp.sgd()),
    "grafted late": lambda opt: fp.graft(fp.sgd(), opt, start=2),
    "accumulate": lambda opt: fp.accumulate(opt, 2),
    "skip_nonfinite": fp.skip_nonfinite,
    "kl_clip": lambda opt: fp.kl_clip(opt, rate=0.1),
}


# ----------------------------------------------------------------------------- needs not asked for
@every_method
@pytest.mark.parametrize("wrap", WRAPPED)
def test_needs_that_were_never_asked_for_are_missed_at_every_step(name, wrap):
    toy, opt = problems.mlp(), WRAPPED[wrap](intervals(name))
    forgotten = fp.observe(toy.problem, toy.params, toy.batch)
    state = opt.init(toy.params)
    for t in range(3):
        if opt.needs(t):
            with pytest.raises(fp.MissingEvidence, match=r"Pass opt.needs\(t\) to fp.observe"):
                opt.update(state, forgotten.grads, forgotten)
        else:
            assert build(name).needs(0) == ()
            opt.update(state, forgotten.grads, forgotten)
        batch, generator = toy.at(t), seeded(t)
        evidence = fp.observe(toy.problem, toy.params, batch, opt.needs(t), generator=generator)
        state, _ = opt.update(state, evidence.grads, evidence)


@every_method
def test_the_needs_of_another_method_are_not_its_own(name):
    toy, opt = problems.mlp(), intervals(name)
    curvature, diagonal = fp.curvature.PerSampleGrads(), fp.representation.Diagonal
    other = fp.compose(curvature, diagonal, fp.solver.Divide(), every=7)
    evidence = fp.observe(toy.problem, toy.params, toy.batch, other.needs(0))
    if opt.needs(0):
        with pytest.raises(fp.MissingEvidence, match="contains PerSampleGrads"):
            opt.update(opt.init(toy.params), evidence.grads, evidence)


@every_method
def test_a_step_at_which_nothing_is_due_says_so(name):
    """So that it differs from a step at which nothing was asked for."""
    opt = intervals(name)
    assert {bool(opt.needs(t)) for t in range(6)} == {bool(opt.needs(0))}


# --------------------------------------------------------------------------- gradients that changed
def wide() -> Toy:
    """Layers for which the rows of the gradient cost less than the gradient."""
    module = nn.Sequential(nn.Linear(12, 20), nn.LayerNorm(20), nn.Tanh(), nn.Linear(20, 9))
    batches = tuple(problems.labelled(2, 12, 9, 10 * i) for i in range(3))
    return Toy(fp.problem(problems.initialised(module), fp.losses.cross_entropy), batches)


def doubled(grads):
    torch._foreach_mul_(list(grads.values()), 2.0)


def clipped(grads):
    for g in grads.values():
        g.mul_(0.5 / torch.linalg.vector_norm(g))


def one_replaced(grads):
    grads["0.weight"] = 3 * grads["0.weight"]


def one_changed(grads):
    grads["3.weight"].mul_(-0.5)


def through_a_view(grads):
    for g in grads.values():
        g.detach().view(-1)[0] = 1.0


CHANGES = (doubled, clipped, one_replaced, one_changed, through_a_view)


@every_method
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_gradient_changed_in_place_is_the_gradient_that_counts(name, change):
    toy, opt = wide(), build(name)
    state, _, _ = problems.update(toy, opt, steps=1)

    def observed():
        return fp.observe(toy.problem, toy.params, toy.at(1), opt.needs(1), generator=seeded(1))

    evidence, reference = observed(), observed()
    change(evidence.grads)
    given = {k: g.clone() for k, g in evidence.grads.items()}
    found = opt.update(state, evidence.grads, evidence)
    assert_same({k: g for k, g in evidence.grads.items()}, given)
    assert_close(found, opt.update(state, given, reference), rtol=1e-9)


@every_method
def test_a_gradient_that_was_not_changed_needs_no_copy(name):
    """Its rows and its copy give the same direction, so that the law above is not empty."""
    toy, opt = wide(), build(name)
    state, found, evidence = problems.update(toy, opt, steps=1)
    copied = {k: g.clone() for k, g in evidence.grads.items()}
    assert evidence.is_own(evidence.grads)
    assert not evidence.is_own(copied)
    assert_close(opt.update(opt.init(toy.params), copied, evidence)[1], found, rtol=1e-6)


@every_method
def test_a_gradient_that_is_not_contiguous_has_the_same_direction(name):
    toy, opt = wide(), build(name)
    _, found, evidence = problems.update(toy, opt, steps=1)
    strided = {k: torch.stack([g, g], -1)[..., 0] for k, g in evidence.grads.items()}
    assert not any(g.is_contiguous() for g in strided.values())
    assert_close(opt.update(opt.init(toy.params), strided, evidence)[1], found, rtol=1e-6)


def test_evidence_with_another_gradient_does_not_own_it():
    toy = wide()
    evidence = fp.observe(toy.problem, toy.params, toy.batch)
    other = {k: 2 * g for k, g in evidence.grads.items()}
    replaced = dataclasses.replace(evidence, grads=other)
    assert not replaced.is_own(replaced.grads)
    mapped = fp.tree.map(lambda x: 2 * x, evidence)
    assert not mapped.is_own(mapped.grads)
    evidence.grads["0.bias"].add_(1.0)
    for twin in (evidence, copy.copy(evidence), copy.deepcopy(evidence)):
        assert not twin.is_own(twin.grads)
    assert evidence.is_own({k: evidence.grads[k] for k in ("0.weight", "3.bias")})


@pytest.mark.compile
@pytest.mark.parametrize("name", ["kfac", "ekfac", "smw_ng"])
def test_a_change_in_place_inside_a_compiled_function_counts(name):
    toy, opt = wide(), build(name)
    noise = fp.draw(toy.problem, toy.params, toy.batch, opt.needs(0), generator=seeded(0))

    def direction(params, factor):
        evidence = fp.observe(toy.problem, params, toy.batch, opt.needs(0), noise=noise)
        for g in evidence.grads.values():
            g.mul_(factor)
        return opt.update(opt.init(params), evidence.grads, evidence)[1]

    whole = direction(toy.params, 2.0)
    compiled = torch.compile(direction, backend="aot_eager")
    assert_close(compiled(toy.params, 2.0), whole, rtol=1e-9)
    stacked = {k: torch.stack([p, p]) for k, p in toy.params.items()}
    found = torch.vmap(direction, in_dims=(0, None))(stacked, 2.0)
    assert_close({k: d[1] for k, d in found.items()}, whole, rtol=1e-9)


# ----------------------------------------------------------------------- states of other parameters
MISFITS = {
    "a name is missing": ({"0.bias"}, {}, r"entries for \['0.bias'\], which the gradient lacks"),
    "a name is new": (set(), {"3.extra": (2, 2)}, r"no entry for \['3.extra'\]"),
    "a shape differs": (set(), {"0.weight": (7, 12)}, r"0.weight: \(20, 12\), not \(7, 12\)"),
    "a shape that would broadcast": (set(), {"0.bias": (1,)}, r"0.bias: \(20,\), not \(1,\)"),
}


CASES = [("alone", case) for case in MISFITS]
CASES += [(wrap, "a name is new") for wrap in ("chain", "partition", "skip_nonfinite", "kl_clip")]


@every_method
@pytest.mark.parametrize(("wrap", "case"), CASES)
def test_a_state_of_other_parameters_is_refused_by_name(name, wrap, case):
    dropped, added, sentence = MISFITS[case]
    toy, opt = wide(), WRAPPED[wrap](build(name))
    if name in ("engd", "sgd", "smw_gn", "smw_ng", "sr") and wrap != "partition":
        pytest.skip("its state has nothing of the parameters")
    first = opt.init(toy.params)
    for state in (first, problems.update(toy, opt, 1)[0]):
        evidence = fp.observe(toy.problem, toy.params, toy.batch, opt.needs(0), generator=seeded(0))
        grads = {k: g for k, g in evidence.grads.items() if k not in dropped}
        grads |= {k: problems.normal(shape) for k, shape in added.items()}
        with pytest.raises(ValueError, match=sentence) as error:
            opt.update(state, grads, evidence)
        assert "opt.init(params)" in str(error.value)


@pytest.mark.parametrize(
    "transform", [fp.momentum(), fp.accumulate(fp.sgd(), 2)], ids=["momentum", "accumulate"]
)
def test_a_transform_with_a_state_refuses_that_of_other_parameters(transform):
    toy = wide()
    state = transform.init({"0.weight": toy.params["0.weight"]})
    evidence = fp.observe(toy.problem, toy.params, toy.batch, transform.needs(0))
    with pytest.raises(ValueError, match="no entry for"):
        transform.update(state, evidence.grads, evidence)
