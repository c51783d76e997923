import pytest
import torch
from hypothesis import given

from funcprecond.curvature.gradient import OuterProduct
from funcprecond.linalg.axes import axes_of
from funcprecond.representation.kronecker_dim import KroneckerDim
from tests import reference, strategies
from tests.equality import assert_close
from tests.problems import normal


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((), ()),
        ((1,), ()),
        ((5,), ()),
        ((5, 1), ()),
        ((1, 5, 1), ()),
        ((2, 3), (0, 1)),
        ((2, 1, 3), (0, 2)),
        ((1, 2, 1, 3), (1, 3)),
        ((2, 3, 4, 5), (0, 1, 2, 3)),
        ((0, 3, 4), ()),
    ],
)
def test_axes_with_a_factor_are_the_long_ones_if_there_are_two(shape, axes):
    assert axes_of(torch.Size(shape)) == axes


@given(strategies.gradients(max_axes=4))
def test_factors_are_the_sums_of_mode_grams(grads):
    rep = KroneckerDim.init({"w": grads[0]})
    for g in grads:
        rep = rep.accumulate(OuterProduct({"w": g}), "sum")
    assert_close(list(rep.factors()["w"]), reference.mode_grams(grads), rtol=1e-12)
    assert rep.diagonals == {}


def test_all_factors_of_a_tensor_have_one_trace():
    g = normal((3, 4, 5))
    rep = KroneckerDim.init({"w": g}).accumulate(OuterProduct({"w": g}), "sum")
    for s in rep.factors()["w"]:
        assert_close(s.trace(), g.square().sum(), rtol=1e-12)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (4, 1)])
def test_vectors_and_scalars_keep_their_squares(shape):
    g = normal(shape)
    rep = KroneckerDim.init({"w": g}).accumulate(OuterProduct({"w": g}), "sum")
    assert rep.totals == {}
    assert_close(rep.diagonals["w"], g.square())


def test_an_average_is_corrected_for_its_start():
    g = normal((3, 4))
    rep = KroneckerDim.init({"w": g})
    for _ in range(3):
        rep = rep.accumulate(OuterProduct({"w": g}), 0.9)
    assert_close(list(rep.factors()["w"]), reference.mode_grams([g]), rtol=1e-12)


def test_half_precision_is_lifted_before_the_product():
    g = normal((40, 30)).bfloat16()
    rep = KroneckerDim.init({"w": g}).accumulate(OuterProduct({"w": g}), "sum")
    expected = reference.mode_grams([g.double()])
    assert_close([s.double() for s in rep.factors()["w"]], expected, rtol=1e-5)
