import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprecond.linalg.nearest_kronecker import nearest_kronecker
from tests.problems import normal


def spd(n, rank, seed):
    rows = normal((rank, n), seed)
    return rows.T @ rows


def rearranged(matrix, v, d):
    """Van Loan's rearrangement of a (v d, v d) matrix: rows are left entries, columns right."""
    return matrix.reshape(v, d, v, d).permute(0, 2, 1, 3).reshape(v * v, d * d)


@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 9)
)
def test_no_kronecker_product_is_nearer(v, d, terms, rank, seed):
    lefts = [spd(v, rank, seed + i) for i in range(terms)]
    rights = [spd(d, rank, seed + 50 + i) for i in range(terms)]
    total = sum(torch.kron(x, y) for x, y in zip(lefts, rights, strict=True))
    left, right = nearest_kronecker(lefts, rights)
    values = torch.linalg.svdvals(rearranged(total, v, d))
    missed = (total - torch.kron(left, right)).norm()
    torch.testing.assert_close(missed, values[1:].norm(), rtol=1e-6, atol=1e-6 * float(values[0]))
    torch.testing.assert_close(left.norm(), right.norm())
    for x in (left, right):
        assert torch.linalg.eigvalsh(x).min() > -1e-9 * x.norm()


def test_diagonals_stand_for_matrices():
    lefts, rights = [normal((5,), i).abs() for i in range(2)], [spd(3, 2, i) for i in range(2)]
    left, right = nearest_kronecker(lefts, rights)
    dense, same = nearest_kronecker([x.diag() for x in lefts], rights)
    torch.testing.assert_close(left.diag(), dense)
    torch.testing.assert_close(right, same)


def test_one_term_and_equal_terms_are_exact():
    x, y = spd(3, 2, 0), spd(2, 2, 1)
    for n in (1, 2, 3):
        torch.testing.assert_close(
            torch.kron(*nearest_kronecker([x] * n, [y] * n)), n * torch.kron(x, y)
        )


def test_nothing_is_nearest_to_nothing():
    left, right = nearest_kronecker([torch.zeros(3)] * 2, [torch.zeros(2, 2)] * 2)
    assert not left.any()
    assert not right.any()
