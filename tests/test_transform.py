import pytest
import torch

import funcprecond as fp
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


def test_a_steps_evidence_holds_no_measurement():
    toy, opt = problems.mlp(), fp.kflr()
    step = fp.make_step(toy.problem, opt)
    assert step(toy.params, opt.init(toy.params), toy.batch, 0)[2].measured == {}


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
        loss(fp.tree.add(toy.params, v, 1e-5)) - loss(fp.tree.add(toy.params, v, -1e-5))
    ) / 2e-5
    slope = fp.tree.dot({k: p.grad for k, p in leaves.items()}, v)
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
