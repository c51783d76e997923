import functools

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import funcprecond as fp
from funcprecond.linalg import treemath
from funcprecond.transform import counter
from tests import problems
from tests.equality import assert_close, assert_same, copy
from tests.problems import seeded


def test_chain_hands_each_direction_on_as_the_next_gradient(randn):
    g = {"w": randn(3)}
    opt = fp.chain(fp.scale(2.0), fp.clip_norm(0.5), fp.scale(10.0))
    assert_close(opt.update(opt.init(g), g)[1]["w"].norm(), torch.tensor(5.0), rtol=1e-6)


def test_the_order_of_a_chain_matters(randn):
    g = {"w": randn(3)}
    first = fp.chain(fp.adam(), fp.scale(0.1))
    second = fp.chain(fp.scale(0.1), fp.adam())
    a, b = (opt.update(opt.init(g), g)[1]["w"] for opt in (first, second))
    assert_close(10 * a, b, rtol=1e-5)


def test_an_empty_chain_is_sgd(randn):
    g = {"w": randn(3)}
    assert_same(fp.chain().update((), g), ((), g))


def test_a_chains_needs_are_its_parts_without_repetition():
    opt = fp.chain(fp.shampoo(), fp.caspr(), fp.sgd())
    assert opt.needs(0) == fp.shampoo().needs(0)


def test_a_chain_refuses_the_state_of_another(randn):
    g = {"w": randn(3)}
    with pytest.raises(ValueError, match="zip"):
        fp.chain(fp.sgd(), fp.adam()).update(fp.chain(fp.sgd()).init(g), g)


def test_apply_subtracts_into_new_tensors_of_the_parameters_dtypes(randn):
    params = {"a": randn(2, dtype=torch.float32), "b": randn(3)}
    before = copy(params)
    direction = {"b": randn(3), "a": randn(2)}
    new = fp.apply(params, direction)
    assert list(new) == ["a", "b"]
    assert_close(new["b"], before["b"] - direction["b"])
    assert new["a"].dtype == torch.float32
    assert_same(params, before)


def test_apply_names_what_the_direction_lacks(randn):
    with pytest.raises(KeyError, match=r"no entry for \['b'\]"):
        fp.apply({"a": randn(1), "b": randn(1)}, {"a": randn(1)})


def test_a_counter_is_an_integer_zero():
    assert counter({"w": torch.ones(2)}).dtype == torch.int64
    assert counter({}) == 0


# --------------------------------------------------------------------------------------- make_step
def test_a_step_is_observe_update_apply():
    toy, opt = problems.mlp(), fp.chain(fp.kfac(), fp.momentum(), fp.scale(0.1))
    noise = fp.draw(toy.problem, toy.params, toy.batch, opt.needs(0), generator=seeded(0))
    state = opt.init(toy.params)
    stepped = fp.make_step(toy.problem, opt)(toy.params, state, toy.batch, 0, noise)
    evidence = fp.observe(toy.problem, toy.params, toy.batch, opt.needs(0), noise=noise)
    state, direction = opt.update(state, evidence.grads, evidence)
    assert_same(stepped[:2], (fp.apply(toy.params, direction), state))
    assert_same(stepped[2].loss, evidence.loss)


def test_a_steps_evidence_is_the_loss_the_outputs_and_the_buffers():
    toy, opt = problems.mlp(), fp.kflr()
    _, _, seen = fp.make_step(toy.problem, opt)(toy.params, opt.init(toy.params), toy.batch, 0)
    assert (seen.params, seen.grads, seen.measured) == ({}, {}, {})
    evidence = fp.observe(toy.problem, toy.params, toy.batch)
    assert_same(
        (seen.loss, seen.outputs, seen.buffers),
        (evidence.loss, evidence.outputs, evidence.buffers),
    )


def test_sgd_with_momentum_equals_torch_optim_on_a_module():
    toy = problems.mlp()
    params, _, _ = problems.train(toy, fp.chain(fp.sgd(), fp.momentum(0.9), fp.scale(0.1)), 5)
    module = problems.mlp_module()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for t in range(5):
        x, y = toy.at(t)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    assert_close(params, {k: p.detach() for k, p in module.named_parameters()}, rtol=1e-12)


def test_a_step_is_differentiable_in_the_learning_rate():
    """The loss after two steps as a function of the rate, against central differences."""
    toy = problems.mlp()

    def loss(rate):
        opt = fp.chain(fp.adam(), fp.scale(rate))
        step = fp.make_step(toy.problem, opt)
        params, state = toy.params, opt.init(toy.params)
        for t in range(2):
            params, state, _ = step(params, state, toy.batch, t)
        return toy.problem.loss(toy.problem(params, toy.batch[0]), toy.batch[1])

    rate = torch.tensor(0.05, dtype=torch.float64)
    numeric = (loss(rate + 1e-5) - loss(rate - 1e-5)) / 2e-5
    assert torch.func.grad(loss)(rate).item() == pytest.approx(numeric.item(), rel=1e-5)


def test_a_step_is_differentiable_in_its_start():
    """Through the gradient itself: the derivative contains Hessian products."""
    toy = problems.mlp()
    step = fp.make_step(toy.problem, fp.scale(0.1))

    def loss(params):
        return step(step(params, (), toy.batch, 0)[0], (), toy.batch, 1)[2].loss

    leaves = {k: p.clone().requires_grad_() for k, p in toy.params.items()}
    loss(leaves).backward()
    v = {k: problems.normal(p.shape, 3) for k, p in toy.params.items()}
    numeric = (
        loss(treemath.add(toy.params, v, 1e-5)) - loss(treemath.add(toy.params, v, -1e-5))
    ) / 2e-5
    slope = treemath.dot({k: p.grad for k, p in leaves.items()}, v)
    assert slope.item() == pytest.approx(numeric.item(), rel=1e-6)


def test_buffers_go_in_and_come_out_of_a_step():
    module = problems.initialised(
        torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
    )
    problem = fp.problem(module, fp.losses.cross_entropy)
    batch = problems.labelled(5, 3, 3, 0)
    step, buffers = fp.make_step(problem, fp.sgd()), None
    for t in range(3):
        _, _, evidence = step(problem.params, (), batch, t, None, buffers)
        buffers = evidence.buffers
    assert buffers["1.num_batches_tracked"] == 3
    assert problem.buffers["1.num_batches_tracked"] == 0


@pytest.mark.parametrize("rate", [0.25, torch.tensor(0.25, dtype=torch.float64)])
def test_a_rate_multiplies_while_it_subtracts(rate):
    toy = problems.mlp()
    direction = {k: torch.ones_like(p) for k, p in toy.params.items()}
    moved = fp.apply(toy.params, direction, rate)
    for k, p in toy.params.items():
        torch.testing.assert_close(moved[k], p - 0.25)
    ends = [
        fp.make_step(toy.problem, opt, **options)(toy.params, state, toy.batch, 0)[0]
        for opt, state, options in (
            (fp.sgd(), (), {"rate": rate}),
            (fp.chain(fp.sgd(), fp.scale(rate)), ((), ()), {}),
        )
    ]
    assert_close(*ends)


# ------------------------------------------------------------------------------------- make_update
def test_an_update_is_what_a_step_does_after_the_gradient():
    toy = problems.mlp()
    opt = fp.chain(fp.shampoo(every=2, refresh_every=3, stagger=True), fp.adamw(), fp.momentum())
    step, update = fp.make_step(toy.problem, opt, rate=0.1), fp.make_update(opt, rate=0.1)
    a = b = (toy.params, opt.init(toy.params))
    for t in range(5):
        grads = fp.observe(toy.problem, b[0], toy.at(t)).grads
        a = step(*a, toy.at(t), t)[:2]
        b = update(*b, grads, t)
        assert_same(a, b)


def test_an_update_says_what_it_cannot_measure(randn):
    params = {"w": randn(2)}
    opt = fp.kfac()
    with pytest.raises(fp.MissingEvidence, match="use fp.make_step"):
        fp.make_update(opt)(params, opt.init(params), params, 0)


# ---------------------------------------------------------------------------------------- donation
@pytest.fixture(params=["aot_eager", "inductor"])
def backend(request, monkeypatch):
    compile_ = functools.partial(torch.compile, backend=request.param)
    monkeypatch.setattr(torch, "compile", compile_)
    torch._dynamo.reset()
    return request.param


def fresh(toy):
    return copy(toy.params)


@pytest.mark.compile
def test_a_donated_step_is_the_pure_one_bit_for_bit_in_the_same_tensors(backend):
    toy = problems.mlp()
    opt = fp.chain(fp.adamw(), fp.momentum(0.9), fp.scale(lambda t: 0.1 / (1 + t)))
    pure = fp.make_step(toy.problem, opt, compile=True)
    donated = fp.make_step(toy.problem, opt, compile=True, donate=True)
    params, state = fresh(toy), opt.init(toy.params)
    mine, my_state = fresh(toy), opt.init(toy.params)
    arrays = [x for x in fp.tree.leaves((mine, my_state)) if x.ndim]
    start, seen = copy(toy.problem.params), []
    for t in range(4):
        params, state, expected = pure(params, state, toy.at(t), t)
        mine, my_state, evidence = donated(mine, my_state, toy.at(t), t)
        assert_same((mine, my_state), (params, state))
        now = [x for x in fp.tree.leaves((mine, my_state)) if x.ndim]
        assert all(a is b for a, b in zip(now, arrays, strict=True))
        assert evidence.params == {}
        seen.append((evidence.loss, evidence.outputs, evidence.grads))
        assert_same(seen[-1], (expected.loss, expected.outputs, expected.grads))
        if t == 0:
            first = copy(seen[0])
    assert_same(seen[0], first)  # nothing of it was written over since
    assert_same(toy.problem.params, start)


@pytest.mark.compile
@pytest.mark.parametrize(
    ("backend", "build"),
    [("inductor", fp.shampoo), ("aot_eager", fp.kfac), ("inductor", fp.lbfgs)],
    indirect=["backend"],
)
def test_intervals_layers_and_old_parameters_in_the_state_can_be_donated(build, backend):
    """Roots that stay, a state that is empty at first, and one that holds the parameters."""
    toy, slow = problems.mlp(), {} if build is fp.lbfgs else {"refresh_every": 2}
    opt = fp.chain(build(**slow), fp.momentum(0.9), fp.scale(0.05))
    ends = []
    for donate in (False, True):
        step = fp.make_step(toy.problem, opt, compile=True, donate=donate)
        params, state = fresh(toy), opt.init(toy.params)
        for t in range(4):
            noise = fp.draw(toy.problem, params, toy.at(t), opt.needs(t), generator=seeded(t))
            params, state, _ = step(params, state, toy.at(t), t, noise)
        ends.append((params, state))
    assert_same(*ends)


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)
def test_batches_of_any_number_of_sizes_are_compiled(backend):
    toy = problems.mlp()
    opt = fp.chain(fp.sgd(), fp.scale(0.1))
    step = fp.make_step(toy.problem, opt, compile=True)
    for n in range(2, 13):
        batch = problems.labelled(n, 3, 3, 0)
        found, _, _ = step(toy.params, opt.init(toy.params), batch, 0)
        grads = fp.observe(toy.problem, toy.params, batch).grads
        assert_close(found, {k: p - 0.1 * grads[k] for k, p in toy.params.items()}, rtol=1e-9)


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)
def test_a_step_with_new_buffers_each_time_has_one_graph(backend):
    """Identities of buffers must not be guarded on, nor what is remembered about the examples."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    problem = fp.problem(problems.initialised(model), fp.losses.cross_entropy)
    opt = fp.chain(fp.kflr(), fp.scale(0.1))
    step = fp.make_step(problem, opt, compile=True)
    counters.clear()
    params, state, buffers = problem.params, opt.init(problem.params), problem.buffers
    for t in range(5):
        params, state, seen = step(params, state, problems.mlp().at(t), t, buffers=buffers)
        buffers = seen.buffers
    # The first step of K-FAC has a graph of its own.
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.compile
def test_evidence_of_a_donated_step_shares_no_memory_with_the_parameters(backend):
    """Outputs that are a parameter."""
    params = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
    problem = fp.problem(
        lambda p, x: (p["a"], p["b"].view(2, 1)),
        lambda outputs, batch: (outputs[0] * outputs[1].view(2)).sum(),
        params=params,
    )
    step = fp.make_step(problem, fp.sgd(), rate=0.5, compile=True, donate=True)
    donated = copy(params)
    new, _, evidence = step(donated, (), (torch.zeros(1), torch.zeros(1)), 0)
    assert new["a"] is donated["a"]
    assert donated["a"].tolist() == [-0.5, 0.0]
    assert evidence.outputs[0].tolist() == [1, 2]
    assert evidence.outputs[1].flatten().tolist() == [3, 4]
    memory = {x.untyped_storage().data_ptr() for x in fp.tree.leaves(donated)}
    seen = fp.tree.leaves(evidence)
    assert memory.isdisjoint(x.untyped_storage().data_ptr() for x in seen)


@pytest.mark.compile
def test_a_donated_update_leaves_the_gradients_alone(backend, randn):
    grads = {"w": randn(3, 2), "b": randn(2)}
    opt, params = fp.adamw(), {"w": randn(3, 2), "b": randn(2)}
    pure, donated = ((copy(params), opt.init(params)) for _ in range(2))
    kept = copy(grads)
    update = fp.make_update(opt, rate=0.1, compile=True)
    over = fp.make_update(opt, rate=0.1, compile=True, donate=True)
    for t in range(3):
        pure, donated = update(*pure, grads, t), over(*donated, grads, t)
    assert_same(donated, pure)
    assert_same(grads, kept)


def test_donation_is_for_compiled_steps():
    toy = problems.mlp()
    with pytest.raises(ValueError, match="compile=True"):
        fp.make_step(toy.problem, fp.sgd(), donate=True)
    with pytest.raises(ValueError, match="compile=True"):
        fp.make_update(fp.sgd(), donate=True)


def test_donation_refuses_what_is_not_the_callers_to_give():
    toy = problems.mlp()
    step = fp.make_step(toy.problem, fp.sgd(), compile=True, donate=True)
    with pytest.raises(ValueError, match="pass copies"):
        step(toy.problem.params, (), toy.batch, 0)
    params = fresh(toy)
    with pytest.raises(ValueError, match="two places"):
        step(params, params, toy.batch, 0)
