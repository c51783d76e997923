import torch
from hypothesis import given

from funcprecond.curvature.gradient import OuterProduct
from funcprecond.linalg.axes import mode_gram
from tests import reference, strategies
from tests.equality import assert_close


@given(strategies.vectors())
def test_the_diagonal_is_that_of_the_dense_matrix(grads):
    outer = OuterProduct(grads)
    dense, diagonal = outer.to_dense(), outer.diagonal()
    for k, g in grads.items():
        assert_close(dense[k], torch.outer(g.reshape(-1), g.reshape(-1)))
        assert_close(diagonal[k].reshape(-1), dense[k].diagonal())
        assert diagonal[k].shape == g.shape


@given(strategies.gradients(max_axes=4, steps=1))
def test_a_mode_gram_is_its_definition(grads):
    for axis, expected in enumerate(reference.mode_grams(grads)):
        assert_close(mode_gram(grads[0], axis), expected, rtol=1e-12)
