"""Columns under ``vmap``, a few at a time."""

import functools

import pytest
from torch import nn

import funcprecond as fp
from tests import problems
from tests.equality import assert_close
from tests.problems import normal, seeded


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 7])
def test_chunks_of_columns_are_the_columns_one_by_one(chunk_size):
    toy = problems.mlp()
    ggn = fp.GGN(toy.problem, toy.params, toy.batch)
    vectors = {k: normal((5, *p.shape), 1) for k, p in toy.params.items()}
    found = ggn.matmat(vectors, chunk_size)
    assert list(found) == list(vectors)
    assert_close(found, ggn @ vectors, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("chunk_size", [0, -1, 2.0])
def test_a_chunk_is_a_positive_number_of_columns(chunk_size):
    toy = problems.mlp()
    vectors = {k: normal((2, *p.shape), 1) for k, p in toy.params.items()}
    with pytest.raises(ValueError, match=f"chunk_size must be .*not {chunk_size}"):
        fp.GGN(toy.problem, toy.params, toy.batch).matmat(vectors, chunk_size)


def test_chunks_share_what_is_drawn():
    module = problems.initialised(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3))
    ).train()
    problem, batch = fp.problem(module, fp.losses.cross_entropy), problems.mlp().batch
    for curvature in (fp.GGN, functools.partial(fp.Fisher, labels="mc")):
        matrix = curvature(problem, problem.params, batch, generator=seeded(0))
        vectors = {k: normal((1, *p.shape), 1).expand(5, *p.shape) for k, p in matrix.like.items()}
        found = matrix.matmat(vectors, 2)
        for x in found.values():
            assert_close(x, x[:1].expand_as(x), rtol=1e-12, atol=1e-14)
        assert_close(found, matrix @ vectors, rtol=1e-11, atol=1e-14)
