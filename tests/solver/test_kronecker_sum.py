import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprecond.representation.kronecker_dim import KroneckerDim
from funcprecond.solver.inverse_root import InverseRoot
from funcprecond.solver.kronecker_sum import KroneckerSum
from tests import reference, strategies
from tests.equality import assert_close, assert_same
from tests.problems import normal
from tests.strategies import with_spectrum


def statistics(*matrices):
    return KroneckerDim({"w": matrices}, {}, torch.ones((), dtype=torch.float64))


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
    direction = applied(KroneckerSum(0.0, p), statistics(left, right), g)
    assert_close(direction.reshape(-1), expected @ g.reshape(-1), rtol=1e-9)


def test_the_default_power_is_the_number_of_long_axes():
    mats = [with_spectrum(torch.linspace(1, 2, n).double(), n) for n in (2, 3, 2)]
    g = normal((2, 3, 2))
    rep = statistics(*mats)
    assert_close(applied(KroneckerSum(), rep, g), applied(KroneckerSum(p=3), rep, g), rtol=1e-12)


def test_it_shares_its_roots_with_shampoo():
    mats = [with_spectrum(torch.linspace(1, 2, n).double(), n) for n in (2, 3)]
    rep = statistics(*mats)
    ours, theirs = (s.prepare(rep, s.init(rep)) for s in (KroneckerSum(1e-6), InverseRoot(1e-6)))
    assert_same(ours, theirs)


@pytest.mark.parametrize("shape", [(3, 1, 2), (1, 3, 2)])
def test_axes_of_length_one_have_no_part_in_the_mean(shape):
    mats = [with_spectrum(torch.linspace(1, 2, n).double(), n) for n in (3, 2)]
    g = normal((3, 2))
    padded = applied(KroneckerSum(), statistics(*mats), g.reshape(shape))
    assert_close(padded, applied(KroneckerSum(), statistics(*mats), g).reshape(shape), rtol=1e-12)


def test_a_doubly_dark_direction_is_amplified_as_documented():
    """Seen by the right factor only: epsilon^(-1/2) / 4 here, epsilon^(-1/4) in Shampoo."""
    left = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    right = reference.eye(2)
    g = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    rep = statistics(left, right)
    caspr = applied(KroneckerSum(1e-6), rep, g).norm().item()
    shampoo = applied(InverseRoot(1e-6), rep, g).norm().item()
    assert caspr == pytest.approx(((1e-6**-0.25 + 1) / 2) ** 2, rel=1e-4)
    assert shampoo == pytest.approx(1e-6**-0.25, rel=1e-4)
