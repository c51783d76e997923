"""One forward run, explicit randomness, and evidence as plain data."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcprecond as fp
from funcprecond.curvature.ggn import GGNOperator
from funcprecond.curvature.hessian import HessianOperator, HessianProbes
from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.curvature.objective import Objective
from funcprecond.curvature.per_sample import PerSampleGrads
from tests import problems
from tests.conformance.methods import build, every_method
from tests.equality import assert_close, assert_same, copy
from tests.problems import Toy, initialised, normal, seeded

NEEDS = {
    "nothing": (),
    "probes": (HessianProbes(2),),
    "operators": (HessianOperator(), GGNOperator()),
    "objective": (Objective(),),
    "layers, mc": (LayerStatistics("mc", 2),),
    "layers, empirical": (LayerStatistics("empirical"),),
    "layers, exact": (LayerStatistics("exact"),),
    "a mark": (fp.Every("refresh"),),
    "all at once": (
        HessianProbes(2),
        GGNOperator(),
        LayerStatistics("mc"),
        LayerStatistics("empirical"),
        Objective(),
    ),
}


def counted(toy: Toy) -> tuple[Toy, list]:
    """The same problem, and a list that grows by one at each run of the model."""
    calls = []

    def forward(params, buffers, inputs):
        calls.append(1)
        return toy.problem.forward(params, buffers, inputs)

    return Toy(dataclasses.replace(toy.problem, forward=forward), toy.batches), calls


# -------------------------------------------------------------------------------- one forward run
@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS.keys())
@pytest.mark.parametrize("make", [problems.mlp, problems.mlp_function, problems.convnet])
def test_the_model_runs_once_whatever_is_asked(make, needs):
    toy, calls = counted(make())
    # The first time, a run on two examples finds where the examples are.
    fp.observe(toy.problem, toy.params, toy.batch, needs, generator=seeded(0))
    assert len(calls) <= 2
    calls.clear()
    fp.observe(toy.problem, toy.params, toy.batch, needs, generator=seeded(0))
    assert len(calls) == 1


@every_method
def test_a_methods_observation_runs_the_model_once(name):
    toy, calls = counted(problems.mlp())
    needs = build(name).needs(0)
    fp.observe(toy.problem, toy.params, toy.batch, needs, generator=seeded(0))
    calls.clear()
    fp.observe(toy.problem, toy.params, toy.batch, needs, generator=seeded(0))
    assert len(calls) == 1


def test_per_example_gradients_add_no_run():
    toy, calls = counted(problems.mlp())
    fp.observe(toy.problem, toy.params, toy.batch, (PerSampleGrads(),))
    calls.clear()
    fp.observe(toy.problem, toy.params, toy.batch, (PerSampleGrads(),))
    assert len(calls) == 1


def test_per_example_gradients_of_what_is_in_no_layer_add_a_run_of_single_examples():
    def model(params, x):
        return x @ params["w"] * params["s"].exp()

    params = {"w": normal((3, 3)), "s": normal((3,))}
    problem = fp.problem(model, fp.losses.cross_entropy, params=params)
    toy, calls = counted(Toy(problem, problems.mlp().batches))
    fp.observe(toy.problem, params, toy.batch, (PerSampleGrads(),))
    calls.clear()
    fp.observe(toy.problem, params, toy.batch, (PerSampleGrads(),))
    assert len(calls) == 2


def test_operators_run_the_model_no_further_time():
    toy, calls = counted(problems.mlp())
    needs = (HessianOperator(), GGNOperator())
    evidence = fp.observe(toy.problem, toy.params, toy.batch, needs)
    for need in needs:
        for _ in range(3):
            evidence[need](toy.params)
    assert len(calls) == 1


def test_objectives_run_it_once_a_call():
    toy, calls = counted(problems.mlp())
    evidence = fp.observe(toy.problem, toy.params, toy.batch, (Objective(),))
    evidence[Objective()].loss(toy.params)
    evidence[Objective()].gradient(toy.params)
    assert len(calls) == 3


# ------------------------------------------------------------------------------------ the evidence
def test_evidence_holds_the_point_the_loss_the_outputs_and_the_gradient():
    toy = problems.mlp()
    evidence = fp.observe(toy.problem, toy.params, toy.batch)
    x, y = toy.batch
    assert evidence.params is toy.params
    assert_close(evidence.outputs, toy.problem(toy.params, x))
    assert_close(evidence.loss, F.cross_entropy(evidence.outputs, y))
    assert evidence.measured == {}


def test_asking_for_more_changes_nothing_else():
    toy = problems.convnet()
    alone = fp.observe(toy.problem, toy.params, toy.batch)
    more = fp.observe(toy.problem, toy.params, toy.batch, NEEDS["all at once"], generator=seeded(0))
    assert_close((more.loss, more.outputs, more.grads), (alone.loss, alone.outputs, alone.grads))


def test_equal_needs_are_measured_once():
    toy = problems.mlp()
    evidence = fp.observe(
        toy.problem,
        toy.params,
        toy.batch,
        [HessianProbes(2), HessianProbes(2)],
        generator=seeded(0),
    )
    assert list(evidence.measured) == [HessianProbes(2)]


def test_what_was_not_measured_is_named_with_what_was():
    toy = problems.mlp()
    evidence = fp.observe(toy.problem, toy.params, toy.batch, (Objective(),))
    assert Objective() in evidence
    assert HessianProbes() not in evidence
    with pytest.raises(
        fp.MissingEvidence, match=r"HessianProbes.*contains Objective.*opt.needs\(t\)"
    ):
        evidence[HessianProbes()]


def test_measurements_are_plain_data():
    toy = problems.mlp()
    needs = (HessianProbes(2), LayerStatistics("mc"), PerSampleGrads())
    evidence = fp.observe(toy.problem, toy.params, toy.batch, needs, generator=seeded(0))
    leaves = torch.utils._pytree.tree_leaves(evidence)
    assert all(isinstance(x, torch.Tensor) and not x.requires_grad for x in leaves)


def test_a_need_of_ones_own_is_measured():
    @dataclasses.dataclass(frozen=True)
    class Accuracy(fp.Need):
        def measure(self, evaluation, noise):
            return (evaluation.outputs.argmax(-1) == evaluation.targets).double().mean()

    toy = problems.mlp()
    evidence = fp.observe(toy.problem, toy.params, toy.batch, (Accuracy(),))
    expected = (evidence.outputs.argmax(-1) == toy.batch[1]).double().mean()
    assert evidence[Accuracy()] == expected


def test_a_need_of_ones_own_may_pull_anything_back():
    @dataclasses.dataclass(frozen=True)
    class OutputSum(fp.Need):
        def measure(self, evaluation, noise):
            return evaluation.pull(torch.ones_like(evaluation.outputs))

    toy = problems.mlp()
    evidence = fp.observe(toy.problem, toy.params, toy.batch, (OutputSum(),))
    expected = torch.func.grad(lambda p: toy.problem(p, toy.batch[0]).sum())(toy.params)
    assert_close(evidence[OutputSum()], expected, rtol=1e-10)


# -------------------------------------------------------------------------------------- randomness
def dropout() -> Toy:
    module = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    toy = problems.mlp()
    return Toy(fp.problem(initialised(module), fp.losses.cross_entropy), toy.batches)


RANDOM = (HessianProbes(2), LayerStatistics("mc", 2))


def test_one_seed_gives_one_observation():
    toy = dropout()
    first, second = (
        fp.observe(toy.problem, toy.params, toy.batch, RANDOM, generator=seeded(3))
        for _ in range(2)
    )
    assert_same(first, second)
    other = fp.observe(toy.problem, toy.params, toy.batch, RANDOM, generator=seeded(4))
    assert not torch.equal(other.loss, first.loss)


@pytest.mark.parametrize("make", [dropout, problems.mlp])
def test_noise_drawn_before_is_the_noise_that_observe_would_draw(make):
    toy = make()
    noise = fp.draw(toy.problem, toy.params, toy.batch, RANDOM, generator=seeded(3))
    first = fp.observe(toy.problem, toy.params, toy.batch, RANDOM, noise=noise)
    second = fp.observe(toy.problem, toy.params, toy.batch, RANDOM, generator=seeded(3))
    assert_same(first, second)


def test_drawing_for_nothing_random_draws_nothing():
    toy = problems.mlp()
    generator = seeded(0)
    before = generator.get_state()
    noise = fp.draw(
        toy.problem, toy.params, toy.batch, (GGNOperator(), Objective()), generator=generator
    )
    assert (noise.masks, noise.needs) == ((), {})
    assert torch.equal(generator.get_state(), before)


def test_a_submodule_in_training_mode_draws_its_masks_beforehand():
    """The root in eval mode says nothing about its children."""
    toy = dropout()
    toy.problem.module.eval()
    toy.problem.module[1].train()
    noise = fp.draw(toy.problem, toy.params, toy.batch, generator=seeded(0))
    assert len(noise.masks) == 1


def test_eval_mode_needs_no_generator():
    toy = dropout()
    toy.problem.module.eval()
    assert fp.draw(toy.problem, toy.params, toy.batch).masks == ()
    assert fp.observe(toy.problem, toy.params, toy.batch).loss.isfinite()


def test_changing_the_mode_changes_what_is_drawn():
    toy = dropout()
    lengths = []
    for mode in (True, False, True):
        toy.problem.module.train(mode)
        noise = fp.draw(toy.problem, toy.params, toy.batch, generator=seeded(0))
        lengths.append(len(noise.masks))
    assert lengths == [1, 0, 1]


@pytest.mark.parametrize("needs", [(), RANDOM])
def test_randomness_without_a_generator_says_what_to_pass(needs):
    toy = dropout()
    with pytest.raises(ValueError, match="pass generator=torch.Generator"):
        fp.observe(toy.problem, toy.params, toy.batch, needs)


def test_torchs_global_generator_is_not_moved():
    toy = dropout()
    before = torch.get_rng_state()
    fp.observe(toy.problem, toy.params, toy.batch, RANDOM, generator=seeded(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_observing_changes_none_of_its_arguments():
    toy = dropout()
    noise = fp.draw(toy.problem, toy.params, toy.batch, RANDOM, generator=seeded(0))
    arguments = (toy.params, toy.batch, noise)
    before = copy(arguments)
    fp.observe(toy.problem, toy.params, toy.batch, RANDOM, noise=noise)
    assert_same(arguments, before)


# ------------------------------------------------------------------------------------------- marks
@pytest.mark.parametrize(
    ("mark", "expected"),
    [
        (fp.Every("x"), [0, 1, 2, 3, 4, 5, 6]),
        (fp.Every("x", 3), [0, 3, 6]),
        (fp.Every("x", 3, start=2), [0, 1, 3, 6]),
        (fp.Every("x", 5, start=4), [0, 1, 2, 3, 5]),
    ],
)
def test_a_mark_is_due_in_the_warm_up_and_at_multiples(mark, expected):
    assert [t for t in range(7) if mark.due(t)] == expected


def test_a_mark_is_evidence_without_a_measurement():
    toy = problems.mlp()
    mark = fp.Every("refresh", 4)
    evidence = fp.observe(toy.problem, toy.params, toy.batch, (mark,))
    assert mark in evidence
    assert fp.Every("refresh", 5) not in evidence


@pytest.mark.parametrize("options", [{"steps": 0}, {"start": -1}])
def test_a_mark_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match="at least 1 and start at least 0"):
        fp.Every("x", **options)


# ----------------------------------------------------------------------------------------- batches
def test_an_empty_batch_is_explained():
    toy = problems.mlp()
    x, y = toy.batch
    with pytest.raises(ValueError, match="at least one"):
        fp.observe(toy.problem, toy.params, (x[:0], y[:0]))


def test_buffers_given_are_the_ones_used():
    module = initialised(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))).eval()
    problem, batch = fp.problem(module, fp.losses.cross_entropy), problems.mlp().batch
    buffers = {k: b + 1 for k, b in problem.buffers.items()}
    evidence = fp.observe(problem, problem.params, batch, buffers=buffers)
    expected = torch.func.functional_call(module, {**problem.params, **buffers}, (batch[0],))
    assert_close(evidence.outputs, expected, rtol=1e-13)


def test_a_loop_that_forgets_the_buffers_is_reminded_once():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    problem = fp.problem(model, fp.losses.cross_entropy)
    batch, opt = problems.mlp().batch, fp.sgd()
    for run in (
        lambda: fp.observe(problem, problem.params, batch),
        lambda: fp.make_step(problem, opt)(problem.params, opt.init(problem.params), batch, 0),
    ):
        problem.reminded.clear()
        run()
        with pytest.warns(UserWarning, match=r"1\.running_mean.* buffers=evidence\.buffers"):
            run()
        run()
    problem.reminded.clear()
    for _ in range(3):
        fp.observe(problem, problem.params, batch, buffers=problem.buffers)
    model.eval()
    for _ in range(3):
        fp.observe(problem, problem.params, batch)
