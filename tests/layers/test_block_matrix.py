"""A layer's parameters as one matrix, and back."""

import pytest
import torch

from funcprecond.layers.block_matrix import join, split
from tests.equality import assert_same
from tests.problems import normal


@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize(
    ("weight", "bias", "rows", "groups", "matrix"),
    [
        ((4, 3), True, 4, 1, (4, 4)),  # outputs first: the bias is a last column
        ((4, 3), True, 5, 1, (5, 3)),  # inputs first: the bias is a last row
        ((4, 3), False, 4, 1, (4, 3)),
        ((4, 3, 2, 2), True, 4, 1, (4, 13)),
        ((4, 3, 2), True, 2, 2, (2, 2, 7)),
    ],
)
def test_a_matrix_has_the_parameters_and_gives_them_back(lead, weight, bias, rows, groups, matrix):
    bias_length = weight[0] if rows * groups == weight[0] else weight[1]
    like = {"w": torch.empty(weight), "b": torch.empty(bias_length)}
    like = like if bias else {"w": like["w"]}
    vector = {k: normal((*lead, *p.shape), i) for i, (k, p) in enumerate(like.items())}
    block = "w+b" if bias else "w"
    joined = join(vector, like, block, rows, groups)
    assert joined.shape == (*lead, *matrix)
    flat = joined.flatten(len(lead), -2) if groups > 1 else joined
    if bias:
        edge = flat[..., -1] if rows * groups == weight[0] else flat[..., -1, :]
        assert_same(edge, vector["b"])
    found = split(joined, like, block, lead)
    assert_same({k: found[k] for k in vector}, vector)


def test_half_precision_is_lifted():
    like = {"w": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.zeros(2)}
    assert join(like, like, "w+b", 2).dtype == torch.float32
