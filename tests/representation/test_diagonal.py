import pytest
import torch
from hypothesis import given

import funcprecond as fp
from funcprecond.curvature.gradient import OuterProduct
from funcprecond.curvature.hessian import HessianProbes
from funcprecond.curvature.per_sample import PerSample, PerSampleGrads
from funcprecond.linalg.precision import factor_dtype
from funcprecond.representation.diagonal import Diagonal
from tests import problems, reference, strategies
from tests.equality import assert_close
from tests.problems import normal


def filled(grads, decay="sum"):
    rep = Diagonal.init(grads[0])
    for g in grads:
        rep = rep.accumulate(OuterProduct(g), decay)
    return rep


@given(strategies.vectors(), strategies.seeds)
def test_every_view_of_it_is_that_of_the_dense_diagonal(x, seed):
    grads = [x, {k: torch.cos(v) for k, v in x.items()}]
    rep = filled(grads)
    d = reference.ravel(grads[0]).square() + reference.ravel(grads[1]).square()
    v = {k: normal(t.shape, seed + i) for i, (k, t) in enumerate(x.items())}
    assert_close(reference.ravel(rep.diagonal()), d, rtol=1e-13)
    assert_close(rep.to_dense(), torch.diag(d), rtol=1e-13)
    assert_close(rep.trace(), d.sum(), rtol=1e-12)
    assert_close(reference.ravel(rep.matvec(v)), d * reference.ravel(v), rtol=1e-13)


def test_an_average_is_corrected_for_its_start():
    g = {"w": normal((3,))}
    assert_close(filled([g, g, g], 0.9).diagonal()["w"], g["w"].square(), rtol=1e-12)


def test_accumulating_leaves_the_old_one():
    g = {"w": normal((3,))}
    rep = Diagonal.init(g)
    rep.accumulate(OuterProduct(g), "sum")
    assert not rep.average.total["w"].any()


def test_statistics_are_in_float32_or_wider():
    assert factor_dtype(torch.zeros(1, dtype=torch.bfloat16)) == torch.float32
    assert factor_dtype(torch.zeros(1, dtype=torch.float64)) == torch.float64
    half = Diagonal.init({"w": torch.zeros(2, dtype=torch.float16)})
    assert half.average.total["w"].dtype == torch.float32


def test_without_parameters_it_is_empty():
    rep = Diagonal.init({}).accumulate(OuterProduct({}), "sum")
    assert rep.diagonal() == {}


@pytest.mark.parametrize("decay", [None, "sum", 0.9])
@pytest.mark.parametrize("need", [PerSampleGrads(), HessianProbes()])
def test_measurements_in_half_precision_are_kept_in_float32(need, decay):
    toy = problems.mlp(torch.bfloat16)
    value = fp.observe(toy.problem, toy.params, toy.batch, (need,), generator=problems.seeded(0))[
        need
    ]
    rep = Diagonal.init(toy.params).accumulate(value, decay)
    assert {t.dtype for t in rep.average.total.values()} == {torch.float32}


def test_squares_of_half_precision_examples_do_not_vanish():
    value = PerSample({"w": torch.full((3, 2), 1e-5, dtype=torch.float16)}, torch.tensor(1.0))
    rep = Diagonal.init({"w": torch.zeros(2, dtype=torch.float16)}).accumulate(value, None)
    assert_close(rep.diagonal()["w"], torch.full((2,), 3 * 1.0014e-5**2), rtol=1e-3)
