import pytest
import torch
from hypothesis import given

from funcprecond.curvature.gradient import OuterProduct
from funcprecond.representation.dense import Dense
from tests import reference, strategies
from tests.equality import assert_close
from tests.problems import normal


@given(strategies.vectors(), strategies.seeds)
def test_every_view_of_it_is_that_of_the_block_diagonal_matrix(x, seed):
    grads = [x, {k: torch.cos(v) for k, v in x.items()}]
    rep = Dense.init(x)
    for g in grads:
        rep = rep.accumulate(OuterProduct(g), "sum")
    blocks = [sum(torch.outer(g[k].reshape(-1), g[k].reshape(-1)) for g in grads) for k in x]
    dense = torch.block_diag(*blocks)
    v = {k: normal(t.shape, seed + i) for i, (k, t) in enumerate(x.items())}
    assert_close(rep.to_dense(), dense, rtol=1e-13)
    assert_close(rep.trace(), dense.trace(), rtol=1e-12)
    assert_close(reference.ravel(rep.matvec(v)), dense @ reference.ravel(v), rtol=1e-10, atol=1e-11)
    assert_close(list(rep.matrices().values()), blocks, rtol=1e-13)


def test_the_limit_is_4096_entries():
    Dense.init({"w": torch.zeros(64)})
    with pytest.raises(ValueError, match=r"'big' \(4097,\).*4097 rows.*4096"):
        Dense.init({"big": torch.zeros(4097)})
