"""IR-1 to IR-10, and the solver around the root."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprecond.curvature.gradient import OuterProduct
from funcprecond.linalg.axes import mode_product
from funcprecond.linalg.batching import by_shape
from funcprecond.representation.dense import Dense
from funcprecond.representation.kronecker_dim import KroneckerDim
from funcprecond.solver.inverse_root import InverseRoot, inverse_root
from tests import reference, strategies
from tests.equality import assert_close, assert_same
from tests.problems import normal
from tests.strategies import orthogonal, with_spectrum

POWERS = st.sampled_from([1, 2, 3, 4, 6, 2.5])


def root(a, p, epsilon=0.0, **options):
    return inverse_root(a, p, epsilon=epsilon, **options)[0]


@given(POWERS)
def test_of_a_diagonal_matrix_it_is_the_scalar_power(p):
    """IR-1."""
    d = torch.logspace(2, -2, 5, dtype=torch.float64)
    expected = torch.diag((d + 1e-4 * d.max()) ** (-1 / p))
    assert_close(root(torch.diag(d), p, 1e-4), expected, rtol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 3, 16, 65])
@pytest.mark.parametrize("p", [2, 4])
def test_a_random_matrix_of_condition_100(n, p):
    """IR-2, in float32 by way of float64."""
    a = with_spectrum(torch.logspace(0, -2, n, dtype=torch.float64), n)
    expected = reference.power(a.float().double(), -1 / p)
    assert_close(root(a.float(), p).double(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("exponents", "epsilon"),
    [((0, -6), 1e-6), ((0, -10), 1e-6), ((0, -6), 1e-5)],
)
@pytest.mark.parametrize("p", [2, 4])
def test_ill_conditioned_matrices_are_within_three_times_the_measured_error(exponents, epsilon, p):
    """IR-3: 3e-8 by float64 eigh, 6e-8 / (p epsilon) by float32 eigh; both against float64."""
    values = torch.logspace(*exponents, 64, dtype=torch.float64)
    a = with_spectrum(values, 0).float()
    # Rounding a to float32 makes its smallest eigenvalues negative: those are zeros.
    spectrum, q = torch.linalg.eigh((a.double() + a.double().T) / 2)
    spectrum = spectrum.clamp_min(0.0) + epsilon * spectrum[-1]
    expected = (q * spectrum ** (-1 / p)) @ q.T
    wide = root(a, p, epsilon).double()
    assert (wide - expected).norm() < 3 * 3e-8 * expected.norm()
    narrow = root(a, p, epsilon, dtype=torch.float32).double()
    assert (narrow - expected).norm() < 3 * 6e-8 / (p * epsilon) * expected.norm()


@given(strategies.spd(), POWERS)
def test_its_power_inverts_the_ridged_matrix(a, p):
    """IR-4."""
    if p == int(p):
        x = torch.linalg.matrix_power(root(a, p, 1e-6), int(p))
        residual = x @ reference.ridge(a, 1e-6)
        assert_close(residual, reference.eye(len(a)), atol=1e-7)


@given(strategies.spd(max_condition=1e2), POWERS)
def test_scale_comes_out_as_its_power(a, p):
    """IR-5."""
    for c in (1e-20, 1e-12, 1e12, 1e20):
        assert_close(root(c * a, p, 1e-6), c ** (-1 / p) * root(a, p, 1e-6), rtol=1e-9)


def test_magnitudes_that_overflow_a_norm_in_float32_do_not_matter():
    a = with_spectrum(torch.logspace(0, -2, 4, dtype=torch.float64), 0).float()
    for c in (1e-30, 1e25):
        assert_close(root(c * a, 4, 1e-6), c**-0.25 * root(a, 4, 1e-6), rtol=1e-5)


@given(strategies.spd(), strategies.seeds)
def test_rotations_pass_through(a, seed):
    """IR-6."""
    q = orthogonal(len(a), seed)
    assert_close(root(q @ a @ q.T, 4, 1e-3), q @ root(a, 4, 1e-3) @ q.T, rtol=1e-7)


def test_a_matrix_of_rank_one_has_its_closed_form():
    """IR-7."""
    g, epsilon, p = normal((5,)), 1e-4, 4
    u = g / g.norm()
    ridge = epsilon * g.square().sum()
    along = torch.outer(u, u)
    expected = ridge ** (-1 / p) * (reference.eye(5) - along)
    expected = expected + (g.square().sum() + ridge) ** (-1 / p) * along
    assert_close(root(torch.outer(g, g), p, epsilon), expected, rtol=1e-8)


def test_a_fourth_root_is_no_square_root():
    """IR-8."""
    a = with_spectrum(torch.tensor([4.0, 2.0, 0.5], dtype=torch.float64), 0)
    x = root(a, 4)
    assert_close(torch.linalg.matrix_power(x, 4) @ a, reference.eye(3), rtol=1e-11)
    assert (torch.linalg.matrix_power(x, 2) @ a - reference.eye(3)).norm() > 0.1


def test_a_stack_is_the_loop_and_a_bad_matrix_spoils_no_other():
    """IR-9 and IR-10."""
    stack = torch.stack([with_spectrum(torch.logspace(0, -i, 4).double(), i) for i in range(4)])
    expected = torch.stack([root(a, 4, 1e-6) for a in stack])
    assert_close(root(stack, 4, 1e-6), expected, rtol=1e-12)
    stack[1] = float("nan")
    stack[2, 0, 0] = float("inf")
    roots, ok = inverse_root(stack, 4, epsilon=1e-6)
    assert ok.tolist() == [True, False, False, True]
    assert_close(roots[[0, 3]], expected[[0, 3]], rtol=1e-12)


def test_a_zero_matrix_is_reported_and_not_raised_to_a_power():
    roots, ok = inverse_root(torch.zeros(2, 3, 3), 4, epsilon=1e-6)
    assert not ok.any()
    assert torch.isfinite(roots).all()


def test_an_indefinite_matrix_has_its_negative_eigenvalues_at_the_ridge():
    a = with_spectrum(torch.tensor([1.0, 0.5, -1e-9], dtype=torch.float64), 0)
    largest = torch.linalg.eigvalsh(root(a, 2, 1e-6)).max()
    assert largest.item() == pytest.approx(1e3, rel=1e-3)


@given(strategies.spd(), POWERS)
def test_a_root_is_symmetric_and_positive(a, p):
    x = root(a, p, 1e-6)
    assert_close(x, x.T, rtol=1e-12)
    assert torch.linalg.eigvalsh(x).min() > 0


def test_an_asymmetric_input_is_symmetrised():
    a = with_spectrum(torch.logspace(0, -2, 4).double(), 0)
    skew = normal((4, 4))
    assert_close(root(a + 1e-3 * (skew - skew.T), 4), root(a, 4), rtol=1e-10)


def test_vmap_over_matrices_is_the_loop():
    stack = torch.stack([with_spectrum(torch.logspace(0, -1, 4).double(), i) for i in range(3)])
    mapped = torch.vmap(lambda a: root(a, 4, 1e-6))(stack)
    assert_close(mapped, torch.stack([root(a, 4, 1e-6) for a in stack]), rtol=1e-10)


# ------------------------------------------------------------------------------------- the solver
def prepared(solver, kind, grads, decay="sum"):
    rep = kind.init({"w": grads[0]})
    for g in grads:
        rep = rep.accumulate(OuterProduct({"w": g}), decay)
    return solver.prepare(rep, solver.init(rep))


@given(strategies.gradients())
def test_a_dense_matrix_is_multiplied_by_its_root(grads):
    solver = InverseRoot(1e-6)
    factor = prepared(solver, Dense, grads)
    expected = reference.adagrad_full(grads, 1e-6) @ grads[-1].reshape(-1)
    direction = solver.apply(factor, {"w": grads[-1]})["w"]
    assert_close(direction.reshape(-1), expected, rtol=1e-6)


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
def test_the_exponent_is_that_of_each_factor(exponent):
    grads = [normal((3, 4), i) for i in range(9)]
    solver = InverseRoot(1e-6, exponent)
    roots = prepared(solver, KroneckerDim, grads).roots["w"]
    expected = [
        reference.power(reference.ridge(s, 1e-6), -exponent) for s in reference.mode_grams(grads)
    ]
    assert_close(list(roots), expected, rtol=1e-8)


def test_before_any_measurement_the_factor_is_the_identity():
    g = {"w": normal((3, 4)), "v": normal((2,)), "s": normal(())}
    rep = KroneckerDim.init(g)
    solver = InverseRoot()
    assert_close(solver.apply(solver.init(rep), g), g)
    # Nor is there a root of nothing.
    assert_close(solver.apply(solver.prepare(rep, solver.init(rep)), g), g)


def test_a_measurement_that_is_not_finite_keeps_the_previous_root_and_says_so():
    solver, g = InverseRoot(), {"w": normal((3, 4)), "v": normal((2,))}
    rep = KroneckerDim.init(g).accumulate(OuterProduct(g), None)
    before = solver.prepare(rep, solver.init(rep))
    bad = {k: x * float("nan") for k, x in g.items()}
    after = solver.prepare(rep.accumulate(OuterProduct(bad), None), before)
    assert_same((after.roots, after.diagonals), (before.roots, before.diagonals))
    assert (int(before.kept), int(after.kept)) == (0, 2)


def test_preparing_in_float32_is_close_and_keeps_the_dtype():
    grads = [normal((6, 5), i) for i in range(20)]
    wide = prepared(InverseRoot(1e-4), KroneckerDim, grads)
    narrow = prepared(
        InverseRoot(1e-4, dtype=torch.float32), KroneckerDim, [g.float() for g in grads]
    )
    assert {r.dtype for r in narrow.roots["w"]} == {torch.float32}
    assert_close([r.double() for r in narrow.roots["w"]], list(wide.roots["w"]), rtol=1e-3)


# -------------------------------------------------------------------------------------- the helpers
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (2, 3, 4, 5)])
def test_a_mode_product_contracts_its_axis_and_leaves_it_in_place(shape):
    x, letters = normal(shape), "abcd"[: len(shape)]
    for axis, n in enumerate(shape):
        m = normal((n, n), axis)
        out = letters.replace(letters[axis], "z")
        expected = torch.einsum(f"z{letters[axis]},{letters}->{out}", m, x)
        assert_close(mode_product(m, x, axis), expected, rtol=1e-12)


def test_by_shape_maps_stacks_and_keeps_the_order():
    sizes = [2, 3, 2, 3, 2]
    tensors = [normal((n, n), i) for i, n in enumerate(sizes)]
    calls = []

    def function(stack, factor):
        calls.append((tuple(stack.shape), factor))
        return factor * stack

    results = by_shape(function, tensors, static=[1, 1, 1, 2, 2])
    expected = [f * t for f, t in zip([1, 1, 1, 2, 2], tensors, strict=True)]
    assert_close(results, expected)
    assert ((2, 2, 2), 1) in calls
    assert len(calls) == 4


def test_by_shape_of_nothing_is_nothing():
    assert by_shape(lambda stack, s: stack, [], static=[]) == []


def failing_eigh(*dtypes):
    decompose = torch.linalg.eigh

    def eigh(a):
        if a.dtype in dtypes:
            raise torch.linalg.LinAlgError
        return decompose(a)

    return eigh


def test_what_does_not_converge_is_tried_again_in_float64(monkeypatch):
    solver = InverseRoot(dtype=torch.float32)
    rep = KroneckerDim.init({"w": normal((6, 5), dtype=torch.float32)})
    for seed in range(20):
        g = {"w": normal((6, 5), seed, dtype=torch.float32)}
        rep = rep.accumulate(OuterProduct(g), "sum")
    expected = InverseRoot(dtype=torch.float64).prepare(rep, solver.init(rep))
    monkeypatch.setattr(torch.linalg, "eigh", failing_eigh(torch.float32))
    found = solver.prepare(rep, solver.init(rep))
    assert_close(found.roots, expected.roots, rtol=1e-4)
    assert int(found.kept) == 0


def test_what_never_converges_keeps_its_root_and_is_counted(monkeypatch):
    g = {"w": normal((6, 5))}
    rep = KroneckerDim.init(g).accumulate(OuterProduct(g), None)
    before = InverseRoot().init(rep)
    monkeypatch.setattr(torch.linalg, "eigh", failing_eigh(torch.float64))
    found = InverseRoot().prepare(rep, before)
    assert_same(found.roots, before.roots)
    assert int(found.kept) == 2
