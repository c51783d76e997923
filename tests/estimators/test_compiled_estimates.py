"""Estimates and spectra as one graph: the same numbers as eagerly."""

import functools

import pytest
import torch

import funcprecond as fp
from funcprecond.estimators.lanczos import lanczos
from funcprecond.estimators.probes import draw_probes
from funcprecond.operators.algebra import Matrix
from tests import problems, strategies
from tests.equality import assert_close
from tests.problems import normal, seeded

pytestmark = pytest.mark.compile


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def compiled(function, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


@pytest.mark.parametrize(
    ("estimator", "products", "probes", "chunk_size"),
    [
        (fp.hutchinson_trace, 3, 3, None),
        (fp.hutchinson_trace, 3, 3, 2),
        (fp.hutchinson_diagonal, 3, 3, 3),
        (fp.hutchpp, 6, 4, 2),
        (fp.xtrace, 4, 2, 2),
        (fp.xdiag, 4, 2, 2),
    ],
)
def test_estimates_are_one_graph(estimator, products, probes, chunk_size):
    toy = problems.mlp()

    def estimate(batch, probes):
        ggn = fp.GGN(toy.problem, toy.params, batch)
        return estimator(ggn, products, probes=probes, chunk_size=chunk_size)

    drawn = draw_probes(fp.GGN(toy.problem, toy.params, toy.batch), probes, seeded(0))
    expected = estimate(toy.batch, drawn)
    assert_close(compiled(estimate)(toy.batch, drawn), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_a_spectrum_is_one_graph(reorthogonalize):
    toy = problems.mlp()

    def density(batch, vectors):
        ggn = fp.GGN(toy.problem, toy.params, batch)
        return fp.spectral_density(ggn, steps=3, vectors=vectors, reorthogonalize=reorthogonalize)

    vectors = normal((1, 31), 1).sign()
    expected = density(toy.batch, vectors)
    assert_close(compiled(density)(toy.batch, vectors), expected, rtol=1e-9, atol=1e-12)


def krylov(matrix, start, steps=4):
    return lanczos(Matrix(matrix, {"a": matrix.new_zeros(matrix.shape[-1])}), start, steps)


def test_a_krylov_space_of_the_default_compiler_is_the_eager_one():
    matrix, start = strategies.with_spectrum(normal((9,), 0), 0), normal((9,), 1)
    found = compiled(krylov, "inductor")(matrix, start)
    assert_close(found, krylov(matrix, start), rtol=1e-10, atol=1e-12)
    assert found.basis.shape == (4, 9)


def test_one_that_ends_early_is_filled_up_with_zeros():
    eye = torch.eye(6, dtype=torch.float64)
    found = compiled(krylov)(eye, normal((6,), 1))
    assert_close(found.alpha, eye[0, :4], atol=1e-13)
    assert_close(found.beta, torch.zeros(4, dtype=torch.float64), atol=1e-13)
    assert not found.basis[1:].any()


def test_krylov_spaces_of_many_matrices_or_starts_at_once_are_one_graph():
    matrices = torch.stack([strategies.with_spectrum(normal((7,), i), i) for i in range(3)])
    starts = normal((3, 7), 4)
    alone = [krylov(m, s) for m, s in zip(matrices, starts, strict=True)]
    together = compiled(torch.vmap(krylov))(matrices, starts)
    for i, one in enumerate(alone):
        for name in ("basis", "alpha", "beta", "following"):
            assert_close(getattr(together, name)[i], getattr(one, name), rtol=1e-9, atol=1e-11)
    of_one = compiled(torch.vmap(functools.partial(krylov, matrices[0])))(starts)
    assert_close(of_one.basis[0], alone[0].basis, rtol=1e-9, atol=1e-11)
