"""Bases by decomposition and by orthogonal iteration, and tensors in them."""

import pytest
import torch
from hypothesis import given

from funcprecond.solver.eigenbasis import (
    axes_below,
    eigenvectors,
    orthogonal_step,
    permute,
    rotate,
    rotate_back,
    turns,
)
from tests import reference, strategies
from tests.equality import assert_close
from tests.problems import normal
from tests.strategies import orthogonal, with_spectrum

EYE = reference.eye(4)
SPECTRUM = torch.tensor([5.0, 1.0, 0.3, 1e-2], dtype=torch.float64)


def signless(q):
    return q * q.sum(0).sign()


@given(strategies.spd())
def test_eigenvectors_are_orthogonal_diagonalise_and_descend(matrix):
    q = eigenvectors(matrix, torch.zeros_like(matrix))
    assert_close(q.T @ q, reference.eye(len(q)), rtol=1e-12)
    d = q.T @ matrix @ q
    assert_close(d.diag().diag(), d, rtol=1e-9)
    assert (d.diag().diff() <= 1e-12 * d.max()).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_null_space_has_one_basis_whatever_the_rounding(dtype):
    rows = normal((2, 5), 3)
    q = eigenvectors((rows.T @ rows).to(dtype), torch.eye(5, dtype=dtype)).double()
    null = torch.eye(5, dtype=torch.float64) - torch.linalg.pinv(rows) @ rows
    assert_close(q[:, 2:] @ q[:, 2:].T, null, rtol=1e-5)
    ramp = q[:, 2:].T @ torch.linspace(1, 2, 5, dtype=torch.float64).diag() @ q[:, 2:]
    assert_close(ramp.diag().diag(), ramp, rtol=1e-5)
    noisy = (rows.T @ rows).to(dtype) * (1 + 2 * torch.finfo(dtype).eps)
    assert_close(signless(eigenvectors(noisy, q.to(dtype)).double()), signless(q), rtol=1e-4)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_matrix_that_is_zero_or_not_finite_leaves_the_old_basis(bad):
    q = orthogonal(4, 0)
    stack = torch.stack([torch.full((4, 4), bad, dtype=torch.float64), with_spectrum(SPECTRUM, 1)])
    before = torch.stack([q, EYE])
    assert torch.equal(eigenvectors(stack, before)[0], q)
    new, order = orthogonal_step(stack, before, 1e-6)
    assert torch.equal(new[0], q)
    assert order[0].tolist() == [0, 1, 2, 3]
    for i, x in enumerate((eigenvectors(stack, before), new)):
        alone = (eigenvectors(stack[1], EYE), orthogonal_step(stack[1], EYE, 1e-6)[0])[i]
        assert_close(x[1], alone, rtol=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.1])
def test_an_exact_basis_is_a_fixed_point_of_the_step(epsilon):
    """SO-6, with the side kept too."""
    q = orthogonal(4, 5)
    new, order = orthogonal_step(q @ SPECTRUM.diag() @ q.T, q, epsilon)
    assert_close(new, q, rtol=1e-10)
    assert order.tolist() == [0, 1, 2, 3]


def test_the_step_sorts_by_descending_eigenvalue():
    q, places = orthogonal(4, 5), torch.tensor([2, 0, 3, 1])
    new, order = orthogonal_step(q @ SPECTRUM.diag() @ q.T, q[:, places], 0.0)
    assert_close(new, q, rtol=1e-10)
    assert places[order].tolist() == [0, 1, 2, 3]


def test_steps_converge_to_the_eigenvectors():
    s, q = with_spectrum(SPECTRUM, 7), EYE
    for _ in range(200):
        q, _ = orthogonal_step(s, q, 1e-6)
    assert_close(signless(q), signless(eigenvectors(s, EYE)), rtol=1e-8)


@pytest.mark.parametrize("n", [512, 520])
def test_the_step_is_the_qr_decomposition_at_every_size(n):
    """Also where rows of zeros are put below the matrix."""
    x, q = normal((n, n), 1), torch.linalg.qr(normal((n, n), 2)).Q
    s = x @ x.T / n
    new, order = orthogonal_step(s, q, 0.1)
    largest = (q * (s @ q)).sum(0).max()
    expected, triangle = torch.linalg.qr((s @ q / largest + 0.1 * q)[:, order])
    assert_close(new, expected * triangle.diag().sign(), rtol=1e-9)
    assert new.is_contiguous()


def test_what_was_never_seen_keeps_its_column():
    s = torch.zeros(4, 4, dtype=torch.float64)
    s[:2, :2] = with_spectrum(SPECTRUM[:2], 2)
    new, _ = orthogonal_step(s, EYE, 1e-6)
    assert_close(new[:, 2:], EYE[:, 2:], rtol=1e-12)


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4), (3, 1, 2)])
def test_rotations_are_dense_kronecker_products(shape):
    axes = axes_below(torch.Size(shape), 10)
    bases = tuple(orthogonal(shape[i], i) for i in axes)
    x = normal(shape)
    dense = reference.kron(*bases)
    expected = (dense.T @ x.reshape(-1)).reshape(shape)
    assert_close(rotate(x, bases, axes), expected, rtol=1e-12)
    assert_close(rotate_back(expected, bases, axes), x, rtol=1e-12)


def test_turns_and_permutations_move_coordinates():
    x, axes = normal((4, 3)), (0, 1)
    old = (orthogonal(4, 0), orthogonal(3, 1))
    orders = (torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0]))
    new = tuple(q[:, order] for q, order in zip(old, orders, strict=True))
    moved = rotate_back(rotate(x, old, axes), turns(old, new), axes)
    assert_close(moved, rotate(x, new, axes), rtol=1e-12)
    assert_close(permute(rotate(x, old, axes), orders, axes), moved, rtol=1e-12)


def test_an_axis_without_an_order_keeps_its_own():
    x, a, c = normal((2, 3, 4, 2)), torch.tensor([1, 0]), torch.tensor([2, 0, 3, 1])
    assert torch.equal(permute(x, (a, c), (0, 2)), x[a][:, :, c])
    assert torch.equal(permute(x, (c,), (2,)), x[:, :, c])
    assert permute(x, (), ()) is x


def test_axes_below_leaves_out_long_and_single_axes():
    assert axes_below(torch.Size((4, 1, 3)), 10) == (0, 2)
    assert axes_below(torch.Size((4, 1, 3)), 3) == (2,)
    assert axes_below(torch.Size((4, 1)), 10) == ()
