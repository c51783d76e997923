import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcprecond as fp
from tests import reference, strategies
from tests.equality import assert_close, assert_same


@given(strategies.vectors(), st.floats(1e-3, 1e3))
def test_the_norm_is_at_most_the_limit_and_the_direction_is_kept(grads, limit):
    _, direction = fp.clip_norm(limit).update((), grads)
    norm = reference.ravel(grads).norm()
    assert_close(direction, {k: g * min(1.0, limit / norm) for k, g in grads.items()}, rtol=1e-12)


def test_it_equals_torchs_clip_grad_norm(randn):
    grads = {"a": randn(3, 2), "b": randn(4)}
    peers = [torch.zeros_like(g, requires_grad=True) for g in grads.values()]
    for p, g in zip(peers, grads.values(), strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(peers, 0.5)
    _, direction = fp.clip_norm(0.5).update((), grads)
    assert_close(list(direction.values()), [p.grad for p in peers], rtol=1e-5)


def test_a_gradient_of_zero_stays_zero():
    grads = {"w": torch.zeros(3)}
    assert_same(fp.clip_norm(1.0).update((), grads)[1], grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_norms_do_not_overflow(dtype, randn):
    grads = {"w": torch.full((100,), 300.0, dtype=dtype)}
    _, direction = fp.clip_norm(1.0).update((), grads)
    assert direction["w"].dtype == dtype
    assert direction["w"].double().norm() == pytest.approx(1.0, rel=1e-2)


def test_a_direction_that_is_not_finite_stays_so():
    grads = {"w": torch.tensor([1.0, float("nan")]), "v": torch.ones(2)}
    _, direction = fp.clip_norm(1.0).update((), grads)
    assert direction["w"].isnan().any()
