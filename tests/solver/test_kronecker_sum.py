import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprecond.solver.inverse_root import InverseRoot, Roots
from funcprecond.solver.kronecker_sum import KroneckerSum, Spectra
from tests import reference, strategies
from tests.equality import assert_close, assert_same
from tests.problems import kronecker_dim, normal
from tests.strategies import with_spectrum


def applied(solver, rep, g):
    return solver.apply(solver.prepare(rep, solver.init(rep)), {"w": g})["w"]


@given(strategies.seeds, st.sampled_from([1, 2, 3, 4]))
def test_a_matrix_is_multiplied_by_the_power_of_the_mean_of_roots(seed, p):
    left = with_spectrum(torch.tensor([4.0, 1.0, 0.1], dtype=torch.float64), seed)
    right = with_spectrum(torch.tensor([2.0, 0.3], dtype=torch.float64), seed + 1)
    one_sided = [
        reference.kron(reference.power(left, -0.5 / p), reference.eye(2)),
        reference.kron(reference.eye(3), reference.power(right, -0.5 / p)),
    ]
    expected = torch.linalg.matrix_power(sum(one_sided) / 2, p)
    g = normal((3, 2), seed)
    direction = applied(KroneckerSum(0.0, p), kronecker_dim(left, right), g)
    assert_close(direction.reshape(-1), expected @ g.reshape(-1), rtol=1e-9)


def test_the_default_power_is_the_number_of_long_axes():
    mats = [with_spectrum(torch.linspace(1, 2, n).double(), n) for n in (2, 3, 2)]
    g = normal((2, 3, 2))
    rep = kronecker_dim(*mats)
    assert_close(applied(KroneckerSum(), rep, g), applied(KroneckerSum(p=3), rep, g), rtol=1e-12)


def test_by_products_it_shares_its_roots_with_shampoo():
    mats = [with_spectrum(torch.linspace(1, 2, n).double(), n) for n in (2, 3)]
    rep = kronecker_dim(*mats)
    solvers = (kind(1e-6, method="coupled_newton") for kind in (KroneckerSum, InverseRoot))
    ours, theirs = (s.prepare(rep, s.init(rep)) for s in solvers)
    assert_same(ours, theirs)


@pytest.mark.parametrize("p", [None, 1, 2, 5])
@pytest.mark.parametrize("sizes", [(3, 4), (2, 3, 4), (2, 3, 2, 3)])
def test_passes_of_roots_and_eigenbases_agree(sizes, p):
    """CA-8, without a ridge, which the two take of different norms."""
    rep = kronecker_dim(*(with_spectrum(torch.logspace(0, -1, n).double(), n) for n in sizes))
    g = normal(sizes)
    passes, bases = (KroneckerSum(0.0, p, method=m) for m in ("coupled_newton", "eigh"))
    assert isinstance(passes.init(rep), Roots)
    assert isinstance(bases.init(rep), Spectra)
    assert_close(applied(passes, rep, g), applied(bases, rep, g), rtol=1e-8)


def test_an_order_between_whole_numbers_is_for_eigenbases():
    mats = [with_spectrum(torch.linspace(1, 2, n).double(), n) for n in (3, 2)]
    rep, g = kronecker_dim(*mats), normal((3, 2))
    one_sided = [
        reference.kron(reference.power(mats[0], -0.2), reference.eye(2)),
        reference.kron(reference.eye(3), reference.power(mats[1], -0.2)),
    ]
    expected = reference.power(sum(one_sided) / 2, 2.5) @ g.reshape(-1)
    direction = applied(KroneckerSum(0.0, 2.5), rep, g)
    assert_close(direction.reshape(-1), expected, rtol=1e-10)
    with pytest.raises(ValueError, match="eigh"):
        KroneckerSum(p=2.5, method="coupled_newton").init(rep)


def test_what_cannot_be_decomposed_stays_as_it_was_and_is_counted():
    solver, g = KroneckerSum(), normal((3, 4))
    rep = kronecker_dim(g @ g.T, g.T @ g)
    before = solver.prepare(rep, solver.init(rep))
    bad = kronecker_dim(torch.full((3, 3), float("nan")).double(), torch.zeros(4, 4).double())
    after = solver.prepare(bad, before)
    assert_same((after.bases, after.values), (before.bases, before.values))
    assert (int(before.kept), int(after.kept)) == (0, 2)


@pytest.mark.parametrize("shape", [(3, 1, 2), (1, 3, 2)])
def test_axes_of_length_one_have_no_part_in_the_mean(shape):
    mats = [with_spectrum(torch.linspace(1, 2, n).double(), n) for n in (3, 2)]
    g = normal((3, 2))
    padded = applied(KroneckerSum(), kronecker_dim(*mats), g.reshape(shape))
    assert_close(
        padded, applied(KroneckerSum(), kronecker_dim(*mats), g).reshape(shape), rtol=1e-12
    )


def test_a_doubly_dark_direction_is_amplified_as_documented():
    """Seen by the right factor only: epsilon^(-1/2) / 4 here, epsilon^(-1/4) in Shampoo."""
    left = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    right = reference.eye(2)
    g = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    rep = kronecker_dim(left, right)
    caspr = applied(KroneckerSum(1e-6), rep, g).norm().item()
    shampoo = applied(InverseRoot(1e-6), rep, g).norm().item()
    assert caspr == pytest.approx(((1e-6**-0.25 + 1) / 2) ** 2, rel=1e-4)
    assert shampoo == pytest.approx(1e-6**-0.25, rel=1e-4)
