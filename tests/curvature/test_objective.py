import torch
from torch import nn

import funcprecond as fp
from funcprecond.curvature.objective import Objective
from tests import problems, reference
from tests.equality import assert_close, assert_same, copy
from tests.problems import initialised, seeded


def test_the_loss_and_the_gradient_elsewhere_are_the_problems():
    toy = problems.mlp()
    objective = fp.observe(toy.problem, toy.params, toy.batch, (Objective(),))[Objective()]
    there = {k: 1.5 * p for k, p in toy.params.items()}

    def loss(p):
        return toy.problem.loss(toy.problem(p, toy.batch[0]), toy.batch[1])

    assert_close(objective.loss(there), loss(there), rtol=1e-13)
    value, gradient = objective.gradient(there)
    assert_close(value, loss(there), rtol=1e-13)
    assert_close(gradient, reference.gradient(loss, there), rtol=1e-7)


def test_it_sees_the_dropout_masks_of_the_observation():
    module = initialised(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
    problem, batch = fp.problem(module, fp.losses.cross_entropy), problems.mlp().batch
    evidence = fp.observe(problem, problem.params, batch, (Objective(),), generator=seeded(0))
    objective = evidence[Objective()]
    assert_close(objective.loss(problem.params), evidence.loss, rtol=1e-13)
    assert_close(objective.gradient(problem.params)[1], evidence.grads, rtol=1e-12)


def test_asking_elsewhere_leaves_buffers_as_they_are():
    module = initialised(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    problem, batch = fp.problem(module, fp.losses.cross_entropy), problems.mlp().batch
    evidence = fp.observe(problem, problem.params, batch, (Objective(),))
    before = copy((problem.buffers, evidence.buffers, dict(module.state_dict())))
    evidence[Objective()].loss({k: 2 * p for k, p in problem.params.items()})
    evidence[Objective()].gradient({k: 3 * p for k, p in problem.params.items()})
    assert_same((problem.buffers, evidence.buffers, dict(module.state_dict())), before)


def test_its_results_carry_no_graph():
    toy = problems.mlp()
    objective = fp.observe(toy.problem, toy.params, toy.batch, (Objective(),))[Objective()]
    results = objective.loss(toy.params), objective.gradient(toy.params)
    assert not any(x.requires_grad for x in torch.utils._pytree.tree_leaves(results))
