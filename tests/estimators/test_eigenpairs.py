import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcprecond as fp
from funcprecond.operators.algebra import Function
from tests import problems, reference, strategies
from tests.equality import assert_close, assert_same
from tests.estimators.test_lanczos import operator, spectrum
from tests.problems import normal, seeded


def wanted(values, which, k):
    key = values.abs() if which == "LM" else values
    return values[key.argsort(descending=which != "SA")][:k]


def rows_of(found):
    return torch.cat([x.flatten(1) for x in found.vectors.values()], 1)


SPECTRA = {
    "spread": torch.linspace(-1, 2, 40, dtype=torch.float64) ** 3,
    "decaying": torch.logspace(1, -2, 40, dtype=torch.float64),
    "clustered": torch.cat(
        [1 + 1e-3 * torch.arange(8, dtype=torch.float64), torch.linspace(0, 0.5, 32).double()]
    ),
    "degenerate": torch.tensor([3.0] * 3 + [1.0] * 12 + [0.0] * 10 + [-2.0] * 15).double(),
    "low rank": torch.cat([torch.tensor([5.0, 4.0]), torch.zeros(38)]).double(),
    "zero": torch.zeros(40, dtype=torch.float64),
}


@pytest.mark.parametrize("max_basis", [None, 12])
@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize("name", SPECTRA)
def test_spectra_of_every_kind_have_the_dense_eigenpairs(name, which, max_basis):
    """Copies of an eigenvalue and what is beyond a low rank included: the space is exhausted."""
    values = SPECTRA[name]
    m = strategies.with_spectrum(values, 0)
    options = {"which": which, "max_basis": max_basis, "max_steps": 2000, "generator": seeded(0)}
    found = fp.eigsh(operator(m), 5, tol=1e-9, **options)
    expected = wanted(values, which, 5)
    assert_close(found.values.sort().values, expected.sort().values, atol=1e-6)
    rows = rows_of(found)
    assert_close(rows @ rows.T, reference.eye(5), atol=1e-9)
    assert_close(rows @ m, found.values.unsqueeze(1) * rows, atol=1e-6)
    assert (found.bounds >= 0).all()


@given(strategies.seeds, st.integers(1, 4), st.integers(0, 8), st.sampled_from(["LM", "LA", "SA"]))
def test_a_bounded_basis_finds_what_an_unbounded_one_does(seed, k, more, which):
    values = normal((25,), seed)
    m = strategies.with_spectrum(values, seed)
    options = {"which": which, "tol": 1e-8, "max_steps": 2000, "generator": seeded(seed)}
    found = fp.eigsh(operator(m), k, max_basis=k + 4 + more, **options)
    assert_close(found.values, wanted(values, which, k), atol=1e-5)


def test_no_more_products_are_taken_and_no_more_vectors_kept_than_allowed():
    values = torch.linspace(0, 1, 300, dtype=torch.float64)
    products = []

    def product(v):
        products.append(v)
        return {"x": values * v["x"]}

    like = {"x": torch.zeros(300, dtype=torch.float64)}
    options = {"tol": 1e-6, "generator": seeded(0)}
    with pytest.raises(RuntimeError, match="after 40 products: raise max_steps, max_basis or tol"):
        fp.eigsh(Function(product, like), 3, max_steps=40, max_basis=10, **options)
    assert len(products) == 40
    products.clear()
    fp.eigsh(Function(product, like), 3, max_steps=5000, max_basis=20, **options)
    restarted = len(products)
    products.clear()
    fp.eigsh(Function(product, like), 3, max_steps=300, **options)
    assert restarted < 2 * len(products)
    with pytest.raises(ValueError, match="max_basis must be at least k \\+ 2 = 5"):
        fp.eigsh(Function(product, like), 3, max_basis=4, **options)


@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
def test_eigenpairs_are_the_dense_ones(which):
    values, m = spectrum(40)
    order = {
        "LM": values.abs().argsort(descending=True),
        "LA": values.argsort(descending=True),
        "SA": values.argsort(),
    }[which][:4]
    found = fp.eigsh(operator(m), 4, which=which, tol=1e-9, max_steps=40, generator=seeded(0))
    assert_close(found.values, values[order], rtol=1e-8)
    rows = torch.cat([x.reshape(4, -1) for x in found.vectors.values()], 1)
    assert_close(rows @ rows.T, reference.eye(4), atol=1e-10)
    assert_close(rows @ m, found.values.unsqueeze(1) * rows, atol=1e-7)
    assert (found.bounds >= 0).all()


def test_eigenpairs_of_a_network_and_what_is_not_known_is_raised():
    toy = problems.mlp()
    ggn = fp.GGN(toy.problem, toy.params, toy.batch)
    exact = torch.linalg.eigvalsh(reference.ggn(toy.problem, toy.params, toy.batch)).flip(0)
    found = fp.eigsh(ggn, 3, tol=1e-8, generator=seeded(0))
    assert_close(found.values, exact[:3], rtol=1e-7)
    assert_same(found, fp.eigsh(ggn, 3, tol=1e-8, generator=seeded(0)))
    with pytest.raises(RuntimeError, match="not known to"):
        fp.eigsh(ggn, 3, tol=1e-8, max_steps=4, generator=seeded(0))
    rough = fp.eigsh(ggn, 3, tol=1e-8, max_steps=4, generator=seeded(0), throw=False)
    nearest = (rough.values.unsqueeze(1) - exact).abs().min(1).values
    assert (nearest <= rough.bounds + 1e-12).all()
    with pytest.raises(ValueError, match="k must be"):
        fp.eigsh(ggn, 0, generator=seeded(0))


def test_copies_are_looked_for_when_distinct_eigenvalues_would_do():
    """The first invariant space has an eigenvector for each of 3, 1 and 0: two are not enough."""
    values = torch.tensor([3.0] * 3 + [1.0] * 12 + [0.0] * 25).double()
    m = strategies.with_spectrum(values, 0)
    found = fp.eigsh(operator(m), 3, which="LA", max_steps=2000, generator=seeded(0))
    assert_close(found.values, values[:3], atol=1e-6)
