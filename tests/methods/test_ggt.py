"""GG-1 to GG-5 and X-6."""

import pytest
import torch
from hypothesis import given

import funcprecond as fp
from tests import strategies
from tests.equality import assert_close
from tests.methods.test_adagrad import last
from tests.problems import normal
from tests.strategies import orthogonal

N, R, LAMBDA = 40, 6, 1e-2


def mean_of(grads, b1):
    n = len(grads)
    return torch.stack([(1 - b1) * b1 ** (n - 1 - i) * g for i, g in enumerate(grads)]).sum(0)


def dense(columns, m, damping=LAMBDA, sgd=True):
    """``[(B B^T)^(1/2) + damping I]^(-1) m`` from the SVD of B, or on its range only."""
    u, s, _ = torch.linalg.svd(torch.stack(columns, 1), full_matrices=False)
    inside = u @ ((u.T @ m) / (s + damping))
    return inside + (m - u @ (u.T @ m)) / damping if sgd else inside


@pytest.mark.parametrize("steps", [1, 3, R])
@pytest.mark.parametrize("outside", ["sgd", "zero"])
def test_before_the_window_is_full_it_is_full_matrix_adagrad(steps, outside):
    """GG-1, and GG-4 with damping."""
    grads = [normal((N,), i) for i in range(steps)]
    opt = fp.ggt(window=R, damping=LAMBDA, momentum=0.9, outside=outside)
    expected = dense(grads, mean_of(grads, 0.9), sgd=outside == "sgd")
    assert_close(last(opt, grads), expected, rtol=1e-10)


def test_a_mean_outside_the_span_is_where_the_two_forms_differ():
    grads = [normal((N,), i) for i in range(R + 3)]
    m, columns = mean_of(grads, 0.9), grads[-R:]
    for outside in ("sgd", "zero"):
        opt = fp.ggt(window=R, damping=LAMBDA, outside=outside)
        assert_close(last(opt, grads), dense(columns, m, sgd=outside == "sgd"), rtol=1e-10)


@pytest.mark.parametrize("outside", ["sgd", "zero"])
def test_a_window_of_one_divides_by_the_length(outside):
    """GG-2."""
    grads = [normal((N,), i) for i in range(3)]
    opt = fp.ggt(window=1, damping=LAMBDA, momentum=0.0, outside=outside)
    g = grads[-1]
    assert_close(last(opt, grads), g / (g.norm() + LAMBDA), rtol=1e-12)
    opt = fp.ggt(window=1, damping=LAMBDA, momentum=0.9, outside="sgd")
    m, length = mean_of(grads, 0.9), g.norm()
    expected = m / LAMBDA + g * ((1 / (length + LAMBDA) - 1 / LAMBDA) / length**2) * (g @ m)
    assert_close(last(opt, grads), expected, rtol=1e-10)


@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_a_full_window_forgets_all_but_the_last_gradients(decay):
    """GG-3."""
    grads = [normal((4, 5), i) for i in range(3 * R + 2)]
    opt = fp.ggt(window=R, damping=LAMBDA, momentum=0.0, decay=decay)
    assert_close(last(opt, grads), last(opt, grads[-R:]), rtol=1e-10)
    state = opt.init({"w": grads[0]})
    for g in grads:
        state, _ = opt.update(state, {"w": g})
    window = state.window["w"]
    assert_close(state.gram["w"], window @ window.T, rtol=1e-12)


def test_without_damping_it_is_the_pseudo_inverse_of_the_root():
    """GG-4 and X-6."""
    grads = [normal((8,), i) for i in range(4)]
    moment = torch.stack([torch.outer(g, g) for g in grads]).sum(0)
    values, vectors = torch.linalg.eigh(moment)
    kept = values > 1e-10
    root = (vectors[:, kept] * values[kept].rsqrt()) @ vectors[:, kept].T
    opt = fp.ggt(window=9, damping=0.0, momentum=0.9)
    assert_close(last(opt, grads), root @ mean_of(grads, 0.9), rtol=1e-9)


def test_on_its_span_it_is_adagrad_full():
    grads = [normal((3, 2), i) for i in range(30)]
    opt = fp.ggt(window=30, damping=0.0, momentum=0.0, epsilon=1e-12)
    assert_close(last(opt, grads), last(fp.adagrad_full(epsilon=1e-14), grads), rtol=1e-6)


@given(strategies.seeds)
def test_ggt_commutes_with_rotations_of_the_whole_parameter(seed):
    """GG-5."""
    grads, q = [normal((7,), seed + i) for i in range(5)], orthogonal(7, seed)
    opt = fp.ggt(window=4, damping=LAMBDA, decay=0.9)
    assert_close(last(opt, [q @ g for g in grads]), q @ last(opt, grads), rtol=1e-9)


def test_the_order_of_the_windows_rows_does_not_matter():
    """GG-5."""
    grads = [normal((N,), i) for i in range(R)]
    opt = fp.ggt(window=R, damping=LAMBDA, momentum=0.0)
    shuffled = [grads[i] for i in (3, 0, 4, 2, 1)] + grads[-1:]
    assert_close(last(opt, shuffled), last(opt, grads), rtol=1e-10)


def test_decay_is_that_of_the_vectors_not_of_the_stored_products():
    grads, b2 = [normal((N,), i) for i in range(R + 4)], 0.7
    columns = [b2 ** ((R - 1 - i) / 2) * g for i, g in enumerate(grads[-R:])]
    opt = fp.ggt(window=R, damping=LAMBDA, momentum=0.9, decay=b2, outside="sgd")
    expected = dense(columns, mean_of(grads, 0.9))
    assert_close(last(opt, grads), expected, rtol=1e-10)


def test_gradients_on_one_line_have_one_direction():
    g = normal((N,))
    opt = fp.ggt(window=R, damping=0.0, momentum=0.0)
    assert_close(last(opt, [2 * g, -g, g]), g / (g.norm() * 6**0.5), rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_float32_the_span_is_cut_where_the_gram_matrix_is_noise(dtype):
    line = normal((N,))
    grads = [(line + 1e-5 * normal((N,), i)).to(dtype) for i in range(1, 5)]
    direction = last(fp.ggt(window=R, damping=0.0, momentum=0.0), grads).double()
    expected = line / (line.norm() * 2)
    assert (direction - expected).norm() < 2e-2 * expected.norm()


def test_zero_gradients_give_zero_and_then_nothing_is_divided():
    opt, g = fp.ggt(window=R), normal((N,))
    assert not last(opt, [torch.zeros(N)]).any()
    direction = last(opt, [torch.zeros(N, dtype=torch.float64), g])
    assert_close(direction, 0.1 * g / (g.norm() + 1e-4), rtol=1e-10)


def test_tensors_are_flattened_one_by_one():
    grads = [normal((2, 3, 2), i) for i in range(4)]
    flat = last(fp.ggt(window=3), [g.reshape(-1) for g in grads])
    assert_close(last(fp.ggt(window=3), grads), flat.reshape(2, 3, 2), rtol=1e-12)


def test_an_option_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="window"):
        fp.ggt(window=0)
    with pytest.raises(ValueError, match="positive"):
        fp.ggt(outside="sgd", damping=0.0)
