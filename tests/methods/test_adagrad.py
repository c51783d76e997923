"""DA-1 to DA-4 and FA-1 to FA-5."""

import pytest
import torch
from hypothesis import given

import funcprecond as fp
from tests import reference, strategies
from tests.equality import assert_close
from tests.peers import run, run_torch
from tests.problems import normal
from tests.strategies import orthogonal


def last(opt, gradients):
    """The direction after these gradients of one tensor."""
    state = opt.init({"w": gradients[0]})
    for g in gradients:
        state, direction = opt.update(state, {"w": g})
    return direction["w"]


def one_hot(n, seed):
    values, places = normal((8,), seed), torch.arange(8) * 5 % n
    return [a * torch.nn.functional.one_hot(i, n) for a, i in zip(values, places, strict=True)]


# ------------------------------------------------------------------------------------- diagonal
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_adagrad_equals_torch_optim_adagrad_over_50_steps(dtype, rtol):
    ours = run(fp.chain(fp.adagrad(), fp.scale(0.1)), 50, dtype)
    assert_close(ours, run_torch(lambda p: torch.optim.Adagrad(p, lr=0.1), 50, dtype), rtol=rtol)


def test_adagrad_with_a_schedule_equals_torch_optims_lr_decay():
    ours = run(fp.chain(fp.adagrad(), fp.scale(lambda t: 0.1 / (1 + 0.2 * t))), 50)
    peer = run_torch(lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.2), 50)
    assert_close(ours, peer, rtol=1e-6)


@given(seed=strategies.seeds)
def test_the_first_step_divides_by_the_magnitude(seed):
    g = normal((2, 3), seed)
    assert_close(last(fp.adagrad(damping=0.3), [g]), g / (g.abs() + 0.3), rtol=1e-13)


@given(seed=strategies.seeds)
def test_without_damping_the_scale_of_the_gradient_is_irrelevant(seed):
    grads = [normal((2, 3), seed + i) for i in range(3)]
    scaled = [1e-3 * g for g in grads]
    opt = fp.adagrad(damping=0.0)
    assert_close(last(opt, scaled), last(opt, grads), rtol=1e-12)


@given(seed=strategies.seeds)
def test_adagrad_commutes_with_permutations_and_not_with_rotations(seed):
    grads = [normal((6,), seed + i) for i in range(3)]
    order, q = torch.tensor([3, 0, 5, 1, 4, 2]), orthogonal(6, seed)
    direction = last(fp.adagrad(), grads)
    assert_close(last(fp.adagrad(), [g[order] for g in grads]), direction[order], rtol=1e-13)
    rotated = last(fp.adagrad(), [q @ g for g in grads])
    assert (rotated - q @ direction).norm() > 1e-3 * direction.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_squared_in_float32(dtype, randn):
    grads = [1e-3 * randn(50, dtype=dtype) for _ in range(3)]
    opt = fp.adagrad()
    state = opt.init({"w": grads[0]})
    for g in grads:
        state, _ = opt.update(state, {"w": g})
    expected = sum(g.double().square() for g in grads)
    assert_close(state.representation.average.total["w"], expected.float(), rtol=1e-6)


def test_decay_none_keeps_the_newest_gradient_only(randn):
    grads = [randn(4), randn(4)]
    assert_close(last(fp.adagrad(decay=None), grads), grads[1].sign(), rtol=1e-8)


# ----------------------------------------------------------------------------------------- full
@given(seed=strategies.seeds)
def test_the_first_full_step_has_the_rank_one_closed_form(seed):
    g = normal((7,), seed)
    expected = g / (g.norm() * (1 + 1e-6) ** 0.5)
    assert_close(last(fp.adagrad_full(), [g]), expected, rtol=1e-9)


@given(seed=strategies.seeds)
def test_full_commutes_with_rotations(seed):
    grads, q = [normal((5,), seed + i) for i in range(7)], orthogonal(5, seed)
    rotated = last(fp.adagrad_full(), [q @ g for g in grads])
    assert_close(rotated, q @ last(fp.adagrad_full(), grads), rtol=1e-7)


@given(seed=strategies.seeds)
def test_the_relative_ridge_makes_full_blind_to_the_gradients_scale(seed):
    grads = [normal((5,), seed + i) for i in range(3)]
    for c in (1e-9, 1e6):
        assert_close(
            last(fp.adagrad_full(), [c * g for g in grads]),
            last(fp.adagrad_full(), grads),
            rtol=1e-7,
        )


def test_one_hot_gradients_make_full_the_diagonal_with_the_ridge_inside_the_root():
    grads = one_hot(5, 3)
    squares = sum(g.square() for g in grads)
    expected = grads[-1] / (squares + 1e-6 * squares.max()).sqrt()
    assert_close(last(fp.adagrad_full(), grads), expected, rtol=1e-10)


def test_one_hot_gradients_make_full_diagonal_and_rmsprop_one_method():
    """X-5, with the ridges out of the way; on one-hot gradients Adam's root is the same."""
    grads = one_hot(4, 5)
    full = last(fp.adagrad_full(epsilon=1e-14), grads)
    assert_close(full, last(fp.adagrad(damping=0.0), grads), rtol=1e-6)


def test_full_equals_the_dense_inverse_root_over_20_gradients():
    grads = [normal((5, 6), i) for i in range(20)]
    expected = reference.adagrad_full(grads, 1e-6) @ grads[-1].reshape(-1)
    assert_close(last(fp.adagrad_full(), grads), expected.reshape(5, 6), rtol=1e-9)


def test_full_refuses_a_parameter_too_large_and_names_it():
    with pytest.raises(ValueError, match=r"'wide' \(65, 65\).*4096.*fp.partition"):
        fp.adagrad_full().init({"wide": torch.zeros(65, 65)})


def test_full_keeps_each_tensor_apart(randn):
    grads = [{"a": randn(3), "b": randn(2, 2)} for _ in range(4)]
    opt = fp.adagrad_full()
    state = opt.init(grads[0])
    for g in grads:
        state, direction = opt.update(state, g)
    assert_close(direction["a"], last(opt, [g["a"] for g in grads]), rtol=1e-12)
    assert_close(direction["b"], last(opt, [g["b"] for g in grads]), rtol=1e-12)
