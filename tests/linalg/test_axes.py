import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprecond.linalg import axes as modes
from funcprecond.linalg.axes import grams, multiply
from funcprecond.linalg.batching import by_shape, over_stacks
from tests.equality import assert_close
from tests.problems import normal

SHAPES = [(7, 9), (3, 3), (4, 5, 3, 3), (3, 4, 40), (40, 3, 3), (2, 3, 2, 3), (6,), (3, 9, 11, 2)]


def subsets(shape):
    axes = range(len(shape))
    return [s for r in range(len(shape) + 1) for s in itertools.combinations(axes, r)]


@pytest.mark.parametrize("shape", SHAPES)
def test_grams_are_those_of_the_unfolded_tensor_for_any_axes(shape):
    x = normal(shape)
    for axes in subsets(shape):
        rows = [x.movedim(i, 0).reshape(shape[i], -1) for i in axes]
        assert_close(list(grams(x, axes)), [r @ r.T for r in rows], rtol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_act_along_their_axes_and_leave_them_in_place(shape):
    x, letters = normal(shape), "abcd"[: len(shape)]
    for axes in subsets(shape):
        matrices = [normal((shape[i], shape[i]), i) for i in axes]
        expected = x
        for m, i in zip(matrices, axes, strict=True):
            out = letters.replace(letters[i], "z")
            expected = torch.einsum(f"z{letters[i]},{letters}->{out}", m, expected)
        found = multiply(matrices, x, axes)
        assert_close(found, expected, rtol=1e-11)
        assert found.is_contiguous()


@given(st.integers(1, 40), st.integers(1, 6), st.integers(2, 8))
def test_a_gram_matrix_by_blocks_of_rows_is_the_gram_matrix(n, m, size):
    x = normal((n, m))
    whole, modes.ROWS = modes.ROWS, size
    try:
        (by_rows,) = grams(x, (0,))
    finally:
        modes.ROWS = whole
    assert_close(by_rows, x @ x.T, rtol=1e-12)


def test_a_gram_matrix_can_be_differentiated_and_mapped():
    x = normal((300, 2))
    value = torch.func.grad(lambda x: grams(x, (0,))[0].sum())(x)
    assert_close(value, 2 * x.sum(0).expand_as(x), rtol=1e-10)
    stack = torch.stack([x, 2 * x])
    assert_close(torch.vmap(lambda x: grams(x, (0,))[0])(stack)[1], 4 * x @ x.T, rtol=1e-12)


def test_functions_of_stacks_may_return_several_tensors():
    tensors = [normal((n, 3), i) for i, n in enumerate((2, 4, 2))]
    found = by_shape(lambda x, s: (s * x, x.sum((-2, -1))), tensors, static=[1, 2, 1])
    assert_close([x for x, _ in found], [tensors[0], 2 * tensors[1], tensors[2]], rtol=0.0)
    assert_close([x for _, x in found], [t.sum() for t in tensors], rtol=1e-12)
    mapped = over_stacks(lambda x, s: (x.T, x.sum()), tensors, static=[1, 2, 1])
    assert_close([x for x, _ in mapped], [t.T for t in tensors], rtol=0.0)
