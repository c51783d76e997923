"""OS-1 to OS-4, X-2 and X-4."""

import pytest
import torch
from hypothesis import given

import funcprecond as fp
from tests import reference, strategies
from tests.equality import assert_close
from tests.methods.test_adagrad import last
from tests.methods.test_soap import directions
from tests.problems import normal
from tests.strategies import orthogonal

EPSILON = 1e-6


def left(grads, epsilon=EPSILON, axis=0):
    return reference.power(reference.ridge(reference.mode_grams(grads)[axis], epsilon), -0.5)


@given(strategies.gradients(max_axes=2))
def test_the_direction_is_the_inverse_root_of_one_gram_matrix(grads):
    first, second = (last(fp.one_sided_shampoo(side=s), grads) for s in ("first", "last"))
    assert_close(first, left(grads) @ grads[-1], rtol=1e-7)
    assert_close(second, grads[-1] @ left(grads, axis=1), rtol=1e-7)
    m, n = first.shape
    assert torch.equal(last(fp.one_sided_shampoo(), grads), first if m <= n else second)


@pytest.mark.parametrize("shape", [(3, 4, 2), (2, 3, 2, 3), (4, 1, 3)])
def test_a_tensor_is_the_matrix_of_its_shortest_axis_by_the_others(shape):
    grads = [normal(shape, i) for i in range(30)]
    axis = min((n, i) for i, n in enumerate(shape) if n > 1)[1]
    root = left(grads, axis=axis)
    expected = torch.tensordot(root, grads[-1], ([1], [axis])).movedim(0, axis)  # pyright: ignore
    assert_close(last(fp.one_sided_shampoo(), grads), expected, rtol=1e-9)


@given(strategies.gradients(max_axes=2))
def test_caspr_with_one_pass_is_the_mean_of_the_two_sides(grads):
    """OS-1 and X-4."""
    both = [last(fp.one_sided_shampoo(side=s), grads) for s in ("first", "last")]
    assert_close(last(fp.caspr(p=1), grads), sum(both) / 2, rtol=1e-7)


def test_shampoo_with_exponent_one_half_on_one_axis_only_is_one_sided():
    """OS-1: the root of Shampoo's own left factor, the right one left out."""
    grads = [normal((3, 4), i) for i in range(5)]
    opt = fp.shampoo(exponent=0.5, epsilon=EPSILON)
    state = opt.init({"w": grads[0]})
    for g in grads:
        state, _ = opt.update(state, {"w": g})
    root = state.factor.roots["w"][0]
    assert_close(last(fp.one_sided_shampoo(), grads), root @ grads[-1], rtol=1e-10)


@given(strategies.gradients(max_axes=2), strategies.seeds)
def test_a_rotation_of_the_other_side_passes_through_and_of_this_one_too(grads, seed):
    """OS-2."""
    opt = fp.one_sided_shampoo(side="first")
    u, v = orthogonal(grads[0].shape[0], seed), orthogonal(grads[0].shape[1], seed + 1)
    direction = last(opt, grads)
    assert_close(last(opt, [g @ v for g in grads]), direction @ v, rtol=1e-6)
    assert_close(last(opt, [u @ g for g in grads]), u @ direction, rtol=1e-6)
    state = opt.init({"w": grads[0]})
    first, _ = opt.update(state, {"w": grads[0]})
    second, _ = opt.update(state, {"w": grads[0] @ v})
    assert_close(first.representation.totals["w"], second.representation.totals["w"], rtol=1e-12)


@pytest.mark.parametrize("ridge", ["inner", "outer"])
@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 6)])
def test_the_first_step_is_the_orthogonal_factor(shape, ridge):
    """OS-3 and X-2."""
    g = normal(shape, 1)
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    direction = last(fp.one_sided_shampoo(epsilon=1e-13, ridge=ridge), [g])
    assert_close(direction, u @ vt, rtol=1e-5)


def test_a_single_column_gets_full_matrix_adagrad_and_a_single_row_its_norm():
    """OS-4, embedded in matrices: a matrix with one column is a vector here."""
    vectors = [normal((4,), i) for i in range(7)]
    column = [torch.stack([g, *[torch.zeros_like(g)] * 5], 1) for g in vectors]
    expected = reference.adagrad_full(vectors, EPSILON) @ vectors[-1]
    assert_close(last(fp.one_sided_shampoo(), column)[:, 0], expected, rtol=1e-7)
    row = [torch.stack([g, torch.zeros_like(g)]) for g in vectors]
    total = torch.stack([g @ g for g in vectors]).sum()
    expected = vectors[-1] / (total * (1 + EPSILON)).sqrt()
    assert_close(last(fp.one_sided_shampoo(), row)[0], expected, rtol=1e-9)


@given(strategies.gradients(max_axes=2))
def test_asgos_ridge_is_added_after_the_root(grads):
    epsilon = 1e-2
    gram = reference.mode_grams(grads)[0]
    u, s, _ = torch.linalg.svd(torch.cat(grads, 1), full_matrices=False)
    inverse = u @ (1 / (s + epsilon * s.max())).diag() @ u.T
    rest = reference.eye(len(gram)) - u @ u.T
    expected = (inverse + rest / (epsilon * s.max())) @ grads[-1]
    opt = fp.one_sided_shampoo(side="first", ridge="outer", epsilon=epsilon)
    assert_close(last(opt, grads), expected, rtol=1e-6)


def test_the_relative_ridge_makes_it_blind_to_the_gradients_scale():
    grads = [normal((3, 4), i) for i in range(3)]
    for ridge in ("inner", "outer"):
        opt = fp.one_sided_shampoo(ridge=ridge)
        for c in (1e-12, 1e12):
            assert_close(last(opt, [c * g for g in grads]), last(opt, grads), rtol=1e-7)


def test_practical_asgo_applies_the_root_of_an_average_to_an_average():
    grads, b1, b2 = [normal((3, 4), i) for i in range(6)], 0.9, 0.8
    mean = sum((1 - b1) * b1 ** (5 - i) * g for i, g in enumerate(grads))
    weighted = [((1 - b2) * b2 ** (5 - i) / (1 - b2**6)) ** 0.5 * g for i, g in enumerate(grads)]
    opt = fp.one_sided_shampoo(momentum=b1, decay=b2)
    assert_close(last(opt, grads), left(weighted) @ mean, rtol=1e-9)


@pytest.mark.parametrize("shape", [(6,), (6, 1), ()])
def test_a_vector_has_diagonal_adagrad_as_under_shampoo(shape):
    grads = [normal(shape, i) for i in range(4)]
    assert_close(last(fp.one_sided_shampoo(), grads), last(fp.shampoo(), grads), rtol=1e-12)


def test_between_refreshes_the_old_root_meets_the_current_gradient():
    grads = [normal((3, 4), i) for i in range(7)]
    found = directions(fp.one_sided_shampoo(refresh_every=5, start=0), grads)
    for t, (g, direction) in enumerate(zip(grads, found, strict=True)):
        seen = grads[:1] if t < 5 else grads[:6]
        assert_close(direction, left(seen) @ g, rtol=1e-6)


@pytest.mark.parametrize("ridge", ["inner", "outer"])
def test_a_zero_gradient_keeps_the_root_that_there_was(ridge):
    opt, g = fp.one_sided_shampoo(decay=None, ridge=ridge), normal((3, 4))
    state, _ = opt.update(opt.init({"w": g}), {"w": g})
    after, direction = opt.update(state, {"w": torch.zeros_like(g)})
    assert torch.equal(after.factor.roots["w"][0], state.factor.roots["w"][0])
    assert not direction["w"].any()


def test_an_option_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="side"):
        fp.one_sided_shampoo(side="left")  # pyright: ignore[reportArgumentType]
