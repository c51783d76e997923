"""Layers that some batches leave out: each block averages the measurements that have it.

The references are closed forms for two linear heads on a shared linear trunk, in dense algebra.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves, tree_structure

import funcprecond as fp
from funcprecond.representation.eigenbasis_moments import _turned
from tests.equality import assert_close, assert_same, finite
from tests.problems import initialised, normal, seeded

EXACT = {"labels": "exact"}
FAMILY = {
    "kfac": lambda **o: fp.kfac(**EXACT, **o),
    "kfac pi": lambda **o: fp.kfac(damping_split="pi", **EXACT, **o),
    "kflr": fp.kflr,
    "ekfac": lambda **o: fp.ekfac(**EXACT, **o),
}
every_member = pytest.mark.parametrize("name", FAMILY)


class Heads(nn.Module):
    """A trunk and two heads, of which a batch uses one, or both for parts of its examples."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 5)
        self.heads = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])
        self.norms = nn.ModuleList([nn.LayerNorm(3), nn.LayerNorm(3)])
        self.scales = nn.ParameterList([torch.ones(3), torch.ones(3)])

    def forward(self, x, task):
        h = torch.tanh(self.trunk(x))
        return self.norms[task](self.heads[task](h)) * (1 + 0.1 * self.scales[task].tanh())


def plain(heads: bool = True) -> tuple[fp.Problem, dict]:
    """The same without norm layers and scales, for closed forms."""
    module = initialised(Heads())

    def model(params, inputs):
        x, task = inputs
        h = torch.tanh(F.linear(x, params["trunk.weight"], params["trunk.bias"]))
        return F.linear(h, params[f"heads.{task}.weight"], params[f"heads.{task}.bias"])

    params = {k: p.detach() for k, p in module.named_parameters() if k[:4] in ("trun", "head")}
    return fp.problem(model, fp.losses.cross_entropy, params=params), params


def full() -> fp.Problem:
    return fp.problem(initialised(Heads()), fp.losses.cross_entropy)


def batch(t: int, task: int, n: int = 6):
    return (normal((n, 4), 10 + t), task), torch.arange(n) % 3


def run(problem, opt, tasks, *, state=None, start=0):
    params, direction, evidence = problem.params, None, None
    state = opt.init(params) if state is None else state
    for t, task in enumerate(tasks):
        if t < start:
            continue
        needs = opt.needs(t)
        evidence = fp.observe(problem, params, batch(t, task), needs, generator=seeded(t))
        state, direction = opt.update(state, evidence.grads, evidence)
    return state, direction, evidence


def factors_of(params, data, task) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of a head on one batch, from the definitions."""
    (x, _), y = data
    h = torch.tanh(x @ params["trunk.weight"].T + params["trunk.bias"])
    a = torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], 1)
    p = (h @ params[f"heads.{task}.weight"].T + params[f"heads.{task}.bias"]).softmax(-1)
    return a.T @ a / len(a), (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)


def averaged(values, decay):
    """The average of measurements under each kind of decay, written out."""
    if decay is None:
        return values[-1]
    if decay == "sum":
        return sum(values)
    total, weight = torch.zeros_like(values[0]), 0.0
    for k, x in enumerate(values, 1):
        d = min(1 - 1 / k, 0.6) if isinstance(decay, fp.RisingDecay) else decay
        total, weight = d * total + (1 - d) * x, d * weight + (1 - d)
    return total / weight


tasks_of = st.lists(st.integers(0, 1), min_size=1, max_size=7)
decays = st.sampled_from([None, 0.5, 0.9, "sum", fp.RisingDecay(0.6)])


@given(tasks=tasks_of, decay=decays, split=st.sampled_from(["joint", "equal"]))
def test_each_head_is_the_dense_average_over_the_batches_that_use_it(tasks, decay, split):
    problem, params = plain()
    options = {"damping": 0.1, "decay": decay, "start": 100, "damping_split": split}
    state, direction, evidence = run(problem, fp.kfac(**EXACT, **options), tasks)
    task = tasks[-1]
    own = [factors_of(params, batch(t, k), k) for t, k in enumerate(tasks) if k == task]
    a, b = (averaged(list(x), decay) for x in zip(*own, strict=True))
    weight, bias = f"heads.{task}.weight", f"heads.{task}.bias"
    g = torch.cat([evidence.grads[weight], evidence.grads[bias][:, None]], 1)
    if split == "joint":
        eye = torch.eye(18, dtype=g.dtype)
        d = torch.linalg.solve(torch.kron(b, a) + 0.1 * eye, g.reshape(-1)).reshape(g.shape)
    else:
        root, eyes = 0.1**0.5, (torch.eye(3).to(g), torch.eye(6).to(g))
        d = torch.linalg.inv(b + root * eyes[0]) @ g @ torch.linalg.inv(a + root * eyes[1])
    assert_close(direction[weight], d[:, :-1], rtol=1e-8)
    assert_close(direction[bias], d[:, -1], rtol=1e-8)
    absent = f"heads.{1 - task}.weight"
    assert not direction[absent].any()


@every_member
@settings(max_examples=8)
@given(tasks=tasks_of, decay=st.sampled_from([0.5, "sum"]))
def test_a_head_has_the_state_of_a_run_on_its_own_batches(name, tasks, decay):
    """With norm layers, scales and a refresh at each step; the batches keep their numbers."""
    problem, opt, task = full(), FAMILY[name](damping=0.1, decay=decay, start=100), tasks[-1]
    _, found, _ = run(problem, opt, tasks)
    state, alone = opt.init(problem.params), None
    for t, k in enumerate(tasks):
        if k == task:
            e = fp.observe(problem, problem.params, batch(t, k), opt.needs(t), generator=seeded(t))
            state, alone = opt.update(state, e.grads, e)
    own = [k for k in problem.params if k.split(".")[1] == str(task)]
    assert len(own) == 5
    assert_close({k: found[k] for k in own}, {k: alone[k] for k in own}, rtol=1e-7)


@every_member
def test_a_head_that_appears_between_two_refreshes_is_preconditioned_at_once(name):
    problem = full()
    opt = FAMILY[name](damping=0.1, refresh_every=50, start=1)
    _, found, evidence = run(problem, opt, [0, 0, 1])
    alone = FAMILY[name](damping=0.1).update
    fresh = FAMILY[name](damping=0.1).init(problem.params)
    e = fp.observe(problem, problem.params, batch(2, 1), opt.needs(0), generator=seeded(2))
    _, expected = alone(fresh, e.grads, _due(e, FAMILY[name](damping=0.1)))
    own = [k for k in problem.params if k.split(".")[1] == "1"]
    assert_close({k: found[k] for k in own}, {k: expected[k] for k in own}, rtol=1e-7)
    assert all((found[k] - evidence.grads[k]).norm() > 0.1 * found[k].norm() for k in own[:2])


def _due(evidence, opt):
    """The evidence of a step at which all work of another method is due."""
    return evidence.part({**evidence.measured, **dict.fromkeys(opt.needs(0)[-2:], ())})


@every_member
def test_the_structure_only_grows_and_then_stays(name):
    problem, opt = full(), FAMILY[name](refresh_every=3, start=1)
    states = [run(problem, opt, [0, 0, 1, 0, 1, 1, 0][:n])[0] for n in range(1, 8)]
    counts = [len(tree_leaves(s)) for s in states]
    assert counts == sorted(counts)
    assert len({str(tree_structure(s)) for s in states[3:]}) == 1
    assert finite(states)
    assert all(isinstance(x, torch.Tensor) for x in tree_leaves(states[-1]))


@every_member
def test_a_batch_without_a_head_leaves_its_blocks_bit_for_bit(name):
    problem, opt = full(), FAMILY[name](refresh_every=100, start=0)
    before, after = (run(problem, opt, tasks)[0] for tasks in ([0, 1, 0, 1], [0, 1, 0, 1, 0]))
    kept = {k: x for k, x in fp.to_dict(before).items() if "s.1." in k}
    assert len(kept) > 5
    assert_same({k: fp.to_dict(after)[k] for k in kept}, kept)


@every_member
def test_a_run_resumes_bit_for_bit_also_where_a_head_was_never_seen(name):
    problem, opt, tasks = full(), FAMILY[name](refresh_every=2, start=1), [0, 0, 0, 1, 0, 1]
    for stop in (2, 5):
        state, _, _ = run(problem, opt, tasks[:stop])
        restored = fp.from_dict(opt.init(problem.params), fp.to_dict(state))
        whole = run(problem, opt, tasks)
        assert_same(run(problem, opt, tasks, state=restored, start=stop)[:2], whole[:2])


@every_member
def test_a_state_of_a_model_without_the_head_is_refused(name):
    problem, opt = full(), FAMILY[name]()
    state, _, _ = run(problem, opt, [0])
    flat = {k: x for k, x in fp.to_dict(state).items() if "s.1." not in k}
    with pytest.raises(ValueError, match=r"lacks \['heads.1.bias', 'heads.1.weight'"):
        fp.from_dict(opt.init(problem.params), flat)


@every_member
def test_a_first_batch_of_a_head_that_is_bad_is_as_if_it_had_not_been(name):
    problem = full()
    opt = fp.skip_nonfinite(FAMILY[name](damping=0.1, decay=0.5, start=100))
    for tasks, bad in (([0, 1, 1, 0, 1], 1), ([0, 1, 0, 1], 0)):
        state, clean = opt.init(problem.params), opt.init(problem.params)
        for t, task in enumerate(tasks):
            (x, _), y = batch(t, task)
            x = x * float("nan") if t == bad else x
            e = fp.observe(
                problem, problem.params, ((x, task), y), opt.needs(t), generator=seeded(t)
            )
            state, found = opt.update(state, e.grads, e)
            if t == bad:
                assert not any(d.any() for d in found.values())
            else:
                clean, expected = opt.update(clean, e.grads, e)
                assert_close(found, expected, rtol=1e-9)


@every_member
def test_an_ensemble_equals_the_loop(name):
    problem, opt = full(), FAMILY[name](damping=0.1, refresh_every=2, start=1)
    step = fp.make_step(problem, opt, rate=0.1)
    members = [{k: p + 0.1 * i for k, p in problem.params.items()} for i in range(2)]
    looped = [(p, opt.init(p)) for p in members]
    stack = lambda *x: torch.stack(x)  # noqa: E731
    params, state = (fp.tree.map(stack, *x) for x in zip(*looped, strict=True))
    for t, task in enumerate([0, 1, 1, 0]):
        (x, _), y = batch(t, task)
        looped = [step(p, s, ((x, task), y), t)[:2] for p, s in looped]

        def one(p, s, x=x, y=y, t=t, task=task):
            return step(p, s, ((x, task), y), t)[:2]

        params, state = torch.vmap(one)(params, state)
    for i, member in enumerate(looped):
        assert_close(fp.tree.map(lambda x, i=i: x[i], (params, state)), member, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.compile
def test_a_compiled_step_takes_turns_and_stops_compiling():
    (problem, _), opt = plain(), FAMILY["kfac"](damping=0.1, start=100)
    eager, compiled = fp.make_step(problem, opt), fp.make_step(problem, opt, compile=True)
    first = second = (problem.params, opt.init(problem.params))
    graphs = []
    for t, task in enumerate([0, 1, 0, 1, 0, 1]):
        first = eager(*first, batch(t, task), t)[:2]
        before = counters["stats"]["unique_graphs"]
        second = compiled(*second, batch(t, task), t)[:2]
        graphs.append(counters["stats"]["unique_graphs"] - before)
    assert_close(second, first, rtol=1e-8)
    assert graphs[4:] == [0, 0]


# --------------------------------------------------------------------------------- mixed batches
class Experts(nn.Module):
    """Each example goes to one expert; an expert without examples is called, or not."""

    def __init__(self, call_empty: bool):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.head, self.call_empty = nn.Linear(4, 3), call_empty

    def forward(self, x):
        which, out = (x[:, 0] > 0).long() + (x[:, 0] > 5).long(), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (which == i).nonzero()[:, 0]
            if len(rows) or self.call_empty:
                out = out.index_add(0, rows, expert(x[rows]))
        return self.head(torch.tanh(out))


@every_member
def test_an_expert_without_examples_may_be_called_or_not(name):
    results = []
    for call_empty in (True, False):
        module = initialised(Experts(call_empty))
        problem = fp.problem(module, fp.losses.cross_entropy)
        opt, x = FAMILY[name](damping=0.1, start=100), normal((9, 4), 3)
        state = opt.init(problem.params)
        for shift in (0.0, 8.0, -8.0, 0.0):
            data = (x + shift, torch.arange(9) % 3)
            evidence = fp.observe(problem, problem.params, data, opt.needs(0), generator=seeded(0))
            state, direction = opt.update(state, evidence.grads, evidence)
        assert finite((state, direction))
        results.append(direction)
    # Which rows belong to which example is not known, so that EKFAC may have diagonals for layers.
    if name != "ekfac":
        assert_close(results[0], results[1], rtol=1e-9)


@pytest.mark.parametrize("kind", ["kfac", "kflr"])
def test_kronecker_factored_does_not_depend_on_which_batch_has_which_layer(kind):
    module = initialised(Experts(call_empty=False))
    problem = fp.problem(module, fp.losses.cross_entropy)
    x = normal((12, 4), 5)
    x = x[x[:, 0].argsort()]
    y = torch.arange(12) % 3
    options = {"kind": kind, "labels": "exact"}
    whole = fp.KroneckerFactored(problem, problem.params, (x, y), **options)
    cut = int((x[:, 0] <= 0).sum())
    assert 0 < cut < 12
    parts = [(x[:cut], y[:cut]), (x[cut:], y[cut:])]
    split = fp.KroneckerFactored(problem, problem.params, batches=parts, **options)
    assert_close(split.to_dense(), whole.to_dense(), rtol=1e-8)
    for i, used in ((0, True), (1, True), (2, False)):
        assert bool(split.diagonal()[f"experts.{i}.weight"].any()) == used


def test_kronecker_factored_adds_the_diagonals_of_batches_with_and_without_a_layer():
    """EKFAC sees no layer where an expert gets some of the examples, and one where it gets all."""
    problem = fp.problem(initialised(Experts(call_empty=False)), fp.losses.cross_entropy)
    x, y = normal((6, 4), 5), torch.arange(6) % 3
    data, options = [(x, y), (x - 8, y)], {"kind": "ekfac", "labels": "exact"}
    each = [fp.KroneckerFactored(problem, problem.params, b, **options).factors for b in data]
    block, names = "experts.0.weight+experts.0.bias", ("experts.0.weight", "experts.0.bias")
    assert block not in each[0].left
    assert block in each[1].left
    layer = each[1].block(block).diagonal().reshape(4, 5)
    found = fp.KroneckerFactored(problem, problem.params, batches=data, **options).diagonal()
    for name, part in zip(names, (layer[:, :-1], layer[:, -1]), strict=True):
        assert_close(found[name], (part + each[0].others[name]) / 2, rtol=1e-9)


def test_kronecker_factored_of_turns_is_the_dense_factors_over_all_examples():
    problem, params = plain()
    data = [batch(t, k, n) for t, (k, n) in enumerate([(0, 6), (1, 9), (0, 3)])]
    found = fp.KroneckerFactored(problem, params, batches=data, labels="exact")
    for task, own in ((0, [0, 2]), (1, [1])):
        sizes = [len(data[i][1]) for i in own]
        pairs = [factors_of(params, data[i], task) for i in own]
        a = sum(n * a for n, (a, _) in zip(sizes, pairs, strict=True)) / sum(sizes)
        b = sum(n * b for n, (_, b) in zip(sizes, pairs, strict=True)) / 18
        block = f"heads.{task}.weight+heads.{task}.bias"
        assert_close(found.factors.block(block), torch.kron(b, a), rtol=1e-10)


# ----------------------------------------------------------------- used in one way and in another
def two_biases(params, inputs):
    x, task = inputs
    return F.linear(x, params["w"], params[f"b{task}"])


def tied_or_not(params, inputs):
    x, task = inputs
    h = F.embedding((x[:, 0] > 0).long(), params["w"]) if task else x
    return F.linear(h, params["w"])


def layer_or_not(params, inputs):
    x, task = inputs
    return (x.unsqueeze(1) * params["w"]).sum(-1) if task else F.linear(x, params["w"])


def unit_or_not(params, inputs):
    x, task = inputs
    h, s, t = F.linear(x, params["w"]), params["s"], params["t"]
    return (h * s + t).tanh() if task else F.layer_norm(h, (3,), s, t)


WAYS = {
    two_biases: {"w": (3, 4), "b0": (3,), "b1": (3,)},
    tied_or_not: {"w": (3, 4)},
    layer_or_not: {"w": (3, 4)},
    unit_or_not: {"w": (3, 4), "s": (3,), "t": (3,)},
}


@every_member
@pytest.mark.parametrize("model", WAYS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("first", [0, 1])
def test_a_parameter_used_in_different_ways_keeps_the_average_of_its_diagonals(model, first, name):
    params = {k: normal(shape, i) for i, (k, shape) in enumerate(WAYS[model].items())}
    problem = fp.problem(model, fp.losses.cross_entropy, params=params)
    opt = FAMILY[name](damping=0.1, decay=0.5, start=100)
    tasks = [first, 1 - first, first]
    state, direction, evidence = run(problem, opt, tasks)

    def diagonal(t, task):
        alone, _, _ = run(problem, opt, [task] * (t + 1), start=t)
        rep = alone.factors if name == "ekfac" else alone.representation
        flat = rep.flattened(list(params))
        return {k: x / flat.divisors()(k) for k, x in flat.others.items()}

    each = [diagonal(t, task) for t, task in enumerate(tasks)]
    rep = state.factors if name == "ekfac" else state.representation
    changed = [k for k in rep.others if all(k in x for x in each)]
    assert {"w", "s"} & {*changed} or model is unit_or_not
    for k in changed:
        expected = averaged([x[k] for x in each], 0.5)
        assert_close(direction[k], evidence.grads[k] / (expected + 0.1), rtol=1e-8)
    assert finite((state, direction))


def test_moments_turned_into_another_basis_are_the_diagonal_of_the_same_matrix():
    u, v, left, right = (torch.linalg.qr(normal((n, n), i)).Q for i, n in enumerate((3, 4, 3, 4)))
    s = normal((3, 4), 9).square()
    old = torch.kron(u, v)
    matrix = old @ torch.diag(s.reshape(-1)) @ old.T
    new = torch.kron(left, right)
    found = _turned(s, (u, left), (v, right))
    assert_close(found.reshape(-1), (new.T @ matrix @ new).diagonal(), rtol=1e-10)
