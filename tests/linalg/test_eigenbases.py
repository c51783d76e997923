"""Bases by decomposition and by orthogonal iteration, and tensors in them."""

import pytest
import torch
from hypothesis import given

from funcprecond.linalg.axes import axes_below
from funcprecond.linalg.eigenbases import eigenvectors, orthogonal_step, rotate, rotate_back, turns
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
    new = orthogonal_step(stack, before, 1e-6)
    assert torch.equal(new[0], q)
    for i, x in enumerate((eigenvectors(stack, before), new)):
        alone = (eigenvectors(stack[1], EYE), orthogonal_step(stack[1], EYE, 1e-6))[i]
        assert_close(x[1], alone, rtol=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.1])
def test_an_exact_basis_is_a_fixed_point_of_the_step(epsilon):
    """SO-6, with the side kept too."""
    q = orthogonal(4, 5)
    new = orthogonal_step(q @ SPECTRUM.diag() @ q.T, q, epsilon)
    assert_close(new, q, rtol=1e-10)


def test_the_order_of_the_columns_does_not_matter_and_stays():
    s, q, places = with_spectrum(SPECTRUM, 7), orthogonal(4, 5), torch.tensor([2, 0, 3, 1])
    expected = orthogonal_step(s, q, 0.1)[:, places]
    assert_close(orthogonal_step(s, q[:, places], 0.1), expected, rtol=1e-12)


def test_without_sorting_columns_are_taken_from_left_to_right():
    s, q = with_spectrum(SPECTRUM, 7), orthogonal(4, 5)
    expected, triangle = torch.linalg.qr(s @ q)
    new = orthogonal_step(s, q, sort=False)
    assert_close(new, expected * triangle.diag().sign(), rtol=1e-9)


def test_steps_converge_to_the_eigenvectors():
    s, q = with_spectrum(SPECTRUM, 7), EYE
    for _ in range(200):
        q = orthogonal_step(s, q, 1e-6)
    order = (q * (s @ q)).sum(0).argsort(descending=True)
    assert_close(signless(q[:, order]), signless(eigenvectors(s, EYE)), rtol=1e-8)


@pytest.mark.parametrize("n", [512, 520])
def test_the_step_is_the_qr_decomposition_at_every_size(n):
    """Also where rows of zeros are put below the matrix."""
    x, q = normal((n, n), 1), torch.linalg.qr(normal((n, n), 2)).Q
    s = x @ x.T / n
    new = orthogonal_step(s, q, 0.1)
    estimates = (q * (s @ q)).sum(0)
    order = estimates.argsort(descending=True)
    expected, triangle = torch.linalg.qr((s @ q / estimates.max() + 0.1 * q)[:, order])
    assert_close(new[:, order], expected * triangle.diag().sign(), rtol=1e-9)
    assert new.is_contiguous()


def test_what_was_never_seen_keeps_its_column():
    s = torch.zeros(4, 4, dtype=torch.float64)
    s[:2, :2] = with_spectrum(SPECTRUM[:2], 2)
    new = orthogonal_step(s, EYE, 1e-6)
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


def test_turns_move_coordinates():
    x, axes = normal((4, 3)), (0, 1)
    old = (orthogonal(4, 0), orthogonal(3, 1))
    new = (orthogonal(4, 2), orthogonal(3, 3))
    moved = rotate_back(rotate(x, old, axes), turns(old, new), axes)
    assert_close(moved, rotate(x, new, axes), rtol=1e-12)


def test_axes_below_leaves_out_long_and_single_axes():
    assert axes_below(torch.Size((4, 1, 3)), 10) == (0, 2)
    assert axes_below(torch.Size((4, 1, 3)), 3) == (2,)
    assert axes_below(torch.Size((4, 1)), 10) == ()
