"""What a partition measures: for each method its own parameters, and nothing for the others."""

import fnmatch

import pytest
import torch

import funcprecond as fp
from funcprecond.autodiff.graph_run import GraphRun
from funcprecond.curvature import (
    HessianProbes,
    LayerStatistics,
    PerSampleGrads,
    SampledGradient,
)
from funcprecond.curvature.hessian import Probes
from funcprecond.curvature.layer_statistics import ExampleRows
from funcprecond.layers.blocks import Layers
from tests import problems
from tests.conformance.methods import build, every_method
from tests.equality import assert_close
from tests.problems import seeded

RULES = [("0.*", "own"), ("*", "rest")]


@every_method
def test_a_method_gets_what_it_would_measure_if_the_others_were_constants(name):
    """Three steps at one point, against the same method on the problem with fewer parameters."""
    toy, method = problems.convnet(), build(name)
    fixed = {k: p for k, p in toy.params.items() if not k.startswith("0.")}
    own = {k: p for k, p in toy.params.items() if k.startswith("0.")}
    forward = toy.problem.forward
    alone = fp.problem(lambda p, x: forward({**fixed, **p}, {}, x)[0], toy.problem.loss, params=own)
    opt = fp.partition(RULES, own=method, rest=fp.sgd())
    state, single = opt.init(toy.params), method.init(own)
    for t in range(3):
        options = [opt.needs(t), method.needs(t)]
        evidence, other = (
            fp.observe(problem, problem.params, toy.at(t), needs, generator=seeded(t))
            for problem, needs in zip((toy.problem, alone), options, strict=True)
        )
        state, direction = opt.update(state, evidence.grads, evidence)
        single, expected = method.update(single, other.grads, other)
        assert_close({k: direction[k] for k in own}, expected, rtol=1e-6)


def names_in(value) -> set[str]:
    """The parameters that a measurement is of."""
    if isinstance(value, Layers):
        return {k for block in (*value.uses, *value.others) for k in block.split("+")}
    if isinstance(value, Probes):
        return {*value.vectors, *value.products}
    return {*value.grads}


MEASURED = [
    LayerStatistics(),
    LayerStatistics("exact", others="rows"),
    LayerStatistics("empirical"),
    ExampleRows(),
    HessianProbes(2),
    PerSampleGrads(),
    SampledGradient(samples=2),
]


@pytest.mark.parametrize("need", MEASURED, ids=str)
@pytest.mark.parametrize("pattern", ["0.*", "*.bias", "1.weight"])
def test_nothing_is_measured_for_the_parameters_of_another_method(need, pattern):
    toy = problems.convnet()
    own = {k for k in toy.params if fnmatch.fnmatchcase(k, pattern)}
    rules = [(pattern, "own"), ("*", "rest")]
    seen = []

    def update(state, grads, evidence=None):
        seen.append(evidence[need])
        return state, grads

    method = fp.Transform(lambda params: (), update, lambda t: (need,))
    opt = fp.partition(rules, own=method, rest=fp.sgd())
    evidence = fp.observe(toy.problem, toy.params, toy.batch, opt.needs(0), generator=seeded(0))
    assert need not in evidence
    opt.update(opt.init(toy.params), evidence.grads, evidence)
    (value,) = seen
    assert names_in(value) == own
    whole = fp.observe(toy.problem, toy.params, toy.batch, (need,), generator=seeded(0))[need]
    assert names_in(whole) == {*toy.params}


def test_a_pull_back_ends_at_the_layers_of_the_method(monkeypatch):
    """The layers below are not reached, which saves their share of the time."""
    toy = problems.mlp()
    reached = []
    whole = GraphRun._pull

    def counted(self, cotangents, inputs, **options):
        reached.append(len(inputs))
        return whole(self, cotangents, inputs, **options)

    monkeypatch.setattr(GraphRun, "_pull", counted)
    opt = fp.partition([("2.*", "a"), ("*", "b")], a=fp.kfac(), b=fp.adam())
    fp.observe(toy.problem, toy.params, toy.batch, opt.needs(0), generator=seeded(0))
    assert reached == [1]


def test_a_need_of_all_methods_is_measured_once_for_all():
    toy = problems.mlp()
    opt = fp.partition([("0.*", "a"), ("*", "b")], a=fp.kfac(damping=0.1), b=fp.kfac(damping=1.0))
    assert LayerStatistics(tied=True) in opt.needs(0)
    assert len(opt.needs(0)) == len(fp.kfac().needs(0))
    three = fp.partition(
        [("0.weight", "a"), ("0.bias", "b"), ("*", "c")],
        a=fp.kfac(damping=0.1), b=fp.kfac(damping=1.0), c=fp.adam(),
    )  # fmt: skip
    assert len(three.needs(0)) == len(fp.kfac().needs(0))
    state, direction, evidence = problems.update(toy, three)
    assert direction.keys() == toy.params.keys()


@every_method
def test_a_partition_inside_others_still_measures_its_own(name):
    toy = problems.mlp()
    inner = fp.partition([("*.weight", "a"), ("*", "b")], a=build(name), b=fp.adam())
    opt = fp.partition(RULES, own=fp.accumulate(inner, 1), rest=fp.momentum())
    _, direction, _ = problems.update(toy, opt, steps=2)
    flat = fp.partition(
        [("0.weight", "a"), ("0.bias", "b"), ("*", "c")],
        a=build(name), b=fp.adam(), c=fp.momentum(),
    )  # fmt: skip
    _, expected, _ = problems.update(toy, flat, steps=2)
    assert_close(direction, expected, rtol=1e-6)


def test_a_rule_that_depends_on_more_than_name_and_shape_is_noticed():
    toy = problems.mlp()
    first = toy.params["0.weight"]
    opt = fp.partition([(lambda k, p: p is first, "a"), ("*", "b")], a=fp.kfac(), b=fp.sgd())
    state = opt.init(toy.params)
    moved = {k: p.clone() for k, p in toy.params.items()}
    evidence = fp.observe(toy.problem, moved, toy.batch, opt.needs(0), generator=seeded(0))
    _, direction = opt.update(state, evidence.grads, evidence)
    assert not torch.equal(direction["0.weight"], evidence.grads["0.weight"])
    opt.init({"other": first})
    evidence = fp.observe(toy.problem, moved, toy.batch, opt.needs(0), generator=seeded(0))
    with pytest.raises(ValueError, match="may depend on the name and the shape"):
        opt.update(state, evidence.grads, evidence)


@pytest.mark.compile
def test_a_compiled_partition_by_patterns_is_the_eager_one():
    toy = problems.mlp()
    opt = fp.partition([("*.bias", "a"), ("*", "b")], a=fp.adam(), b=fp.kfac(labels="exact"))

    state = opt.init(toy.params)

    def direction(params, batch):
        evidence = fp.observe(toy.problem, params, batch, opt.needs(0))
        return opt.update(state, evidence.grads, evidence)[1]

    compiled = torch.compile(direction, backend="aot_eager", fullgraph=True)
    assert_close(compiled(toy.params, toy.batch), direction(toy.params, toy.batch), rtol=1e-9)
