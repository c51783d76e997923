"""CA-1 to CA-10 and X-1 to X-4, X-9, X-11."""

import itertools
import math

import pytest
import torch
from hypothesis import given

import funcprecond as fp
from funcprecond.representation.dense import Dense
from funcprecond.representation.kronecker_dim import KroneckerDim
from funcprecond.solver.inverse_root import InverseRoot
from funcprecond.solver.kronecker_sum import KroneckerSum
from tests import reference, strategies
from tests.equality import assert_close
from tests.methods.test_adagrad import last
from tests.methods.test_shampoo import applied
from tests.problems import kronecker_dim, normal
from tests.strategies import orthogonal

EPSILON = 1e-6


def decaying(shape, seed, steps=6):
    """Gradients of decaying row and column scales: on isotropic ones CASPR is nearly Shampoo."""
    scale = torch.ones(shape, dtype=torch.float64)
    for axis, n in enumerate(shape):
        view = [1] * len(shape)
        view[axis] = n
        scale = scale * torch.logspace(0, -1, n, dtype=torch.float64).reshape(view)
    return [scale * normal(shape, seed + i) for i in range(steps)]


def preconditioner(solver, grads):
    """(N, N): the solver's preconditioner, from its action on each basis vector."""
    rep = KroneckerDim.init({"w": grads[0]})
    for g in grads:
        rep = rep.accumulate(fp.curvature.gradient.OuterProduct({"w": g}), "sum")
    factor = solver.prepare(rep, solver.init(rep))
    columns = [
        solver.apply(factor, {"w": e.reshape(grads[0].shape)})["w"].reshape(-1)
        for e in reference.eye(grads[0].numel())
    ]
    return torch.stack(columns, 1)


# ------------------------------------------------------------------------------ the dense formula
@given(strategies.gradients())
def test_the_direction_is_the_dense_kronecker_sum(grads):
    expected = applied(reference.caspr(grads, EPSILON), grads[-1])
    assert_close(last(fp.caspr(epsilon=EPSILON), grads), expected, rtol=1e-7)


def test_a_matrix_is_multiplied_by_the_square_of_the_kronecker_sum_to_1e_10():
    """CA-1, row-major and column-major."""
    grads = [normal((5, 4), i) for i in range(8)]
    left, right = (reference.ridge(s, EPSILON) for s in reference.mode_grams(grads))
    lq, rq = reference.power(left, -0.25), reference.power(right, -0.25)
    i5, i4 = reference.eye(5), reference.eye(4)
    direction = last(fp.caspr(epsilon=EPSILON), grads)
    row = torch.linalg.matrix_power((reference.kron(lq, i4) + reference.kron(i5, rq)) / 2, 2)
    assert_close(direction.reshape(-1), row @ grads[-1].reshape(-1), rtol=1e-10)
    column = torch.linalg.matrix_power((reference.kron(rq, i5) + reference.kron(i4, lq)) / 2, 2)
    assert_close(direction.T.reshape(-1), column @ grads[-1].T.reshape(-1), rtol=1e-10)


@pytest.mark.parametrize("p", [None, 1, 2, 3])
@pytest.mark.parametrize("shape", [(4, 3), (3, 4, 5), (2, 3, 2, 3)])
def test_every_order_and_power_is_the_dense_power_of_the_mean(shape, p):
    grads = [normal(shape, i) for i in range(60)]
    expected = applied(reference.caspr(grads, EPSILON, p), grads[-1])
    assert_close(last(fp.caspr(epsilon=EPSILON, p=p), grads), expected, rtol=1e-10)


def test_the_root_form_equals_the_eigen_form():
    """CA-8: rotate into the factors' eigenbases, multiply entry by entry, rotate back."""
    grads = decaying((4, 3), 0)
    (lv, lq), (rv, rq) = (
        torch.linalg.eigh(reference.ridge(s, EPSILON)) for s in reference.mode_grams(grads)
    )
    sigma = ((lv[:, None] ** -0.25 + rv[None, :] ** -0.25) / 2) ** 2
    expected = lq @ (sigma * (lq.T @ grads[-1] @ rq)) @ rq.T
    assert_close(last(fp.caspr(), grads), expected, rtol=1e-9)


# ---------------------------------------------------------------------------- operator inequalities
@given(strategies.seeds)
def test_the_difference_to_shampoo_is_the_square_of_the_difference_of_roots(seed):
    """CA-2."""
    grads = decaying((4, 3), seed)
    left, right = (reference.ridge(s, 1e-3) for s in reference.mode_grams(grads))
    lq, rq = reference.power(left, -0.25), reference.power(right, -0.25)
    half = (reference.kron(lq, reference.eye(3)) - reference.kron(reference.eye(4), rq)) / 2
    difference = preconditioner(KroneckerSum(1e-3), grads) - preconditioner(
        InverseRoot(1e-3), grads
    )
    assert_close(difference, half @ half, rtol=1e-9)


def below(x, y, tolerance=1e-9):
    return torch.linalg.eigvalsh(y - x).min() >= -tolerance * torch.linalg.matrix_norm(y, 2)


@given(strategies.seeds)
def test_shampoo_is_below_caspr_is_below_its_lower_powers_is_below_full_adagrad(seed):
    """CA-3 and X-3, with one absolute ridge for all, as the statement has it."""
    grads, r, epsilon = decaying((4, 3), seed), 3, 1e-3
    left, right = (s + epsilon * reference.eye(len(s)) for s in reference.mode_grams(grads))
    # The relative ridge 1e-14 leaves these factors, handed over as statistics, as they are.
    rep = kronecker_dim(left, right)

    def matrix(solver):
        factor = solver.prepare(rep, solver.init(rep))
        columns = [
            solver.apply(factor, {"w": e.reshape(4, 3)})["w"].reshape(-1) for e in reference.eye(12)
        ]
        return torch.stack(columns, 1)

    full = sum(torch.outer(g.reshape(-1), g.reshape(-1)) for g in grads) / r
    full = reference.power(full + epsilon * reference.eye(12), -0.5)
    shampoo = matrix(InverseRoot(1e-14))
    powers = [matrix(KroneckerSum(1e-14, p)) for p in (4, 2, 1)]
    chain = [shampoo, *powers, full]
    assert all(below(x, y) for x, y in itertools.pairwise(chain))


@given(strategies.seeds)
def test_the_regret_trace_is_at_most_shampoos(seed):
    """CA-9."""
    grads = decaying((4, 3), seed)
    left, right = (reference.ridge(s, 1e-3) for s in reference.mode_grams(grads))
    shampoo = reference.power(left, 0.25).trace() * reference.power(right, 0.25).trace()
    caspr = torch.linalg.inv(preconditioner(KroneckerSum(1e-3), grads)).trace()
    assert caspr <= shampoo * (1 + 1e-9)


# ------------------------------------------------------------------------------------- relations
@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 6)])
def test_without_accumulation_it_is_the_orthogonal_factor(shape):
    """CA-4 and X-2."""
    g, epsilon = normal(shape, 1), 0.1
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    ridged = u @ (s / (s.square() + epsilon * s.max() ** 2).sqrt()).diag() @ vt
    assert_close(last(fp.caspr(epsilon=epsilon), [g]), ridged, rtol=1e-10)
    assert_close(last(fp.caspr(epsilon=1e-13), [g]), u @ vt, rtol=1e-3)


@given(strategies.gradients(max_axes=2), strategies.seeds)
def test_caspr_commutes_with_rotations_of_either_side(grads, seed):
    a, b = orthogonal(grads[0].shape[0], seed), orthogonal(grads[0].shape[1], seed + 1)
    rotated = last(fp.caspr(), [a @ g @ b for g in grads])
    assert_close(rotated, a @ last(fp.caspr(), grads) @ b, rtol=1e-5)


@given(strategies.gradients())
def test_the_relative_ridge_makes_caspr_blind_to_the_gradients_scale(grads):
    for c in (1e-12, 1e12):
        scaled = last(fp.caspr(), [c * g for g in grads])
        assert_close(scaled, last(fp.caspr(), grads), rtol=1e-6)


@pytest.mark.parametrize("method", ["eigh", "coupled_newton"])
@pytest.mark.parametrize("shape", [(4, 3), (3, 4, 5), (2, 3, 2, 3)])
def test_of_infinite_order_it_is_shampoo(shape, method):
    grads = [normal(shape, i) for i in range(60)]
    ours = last(fp.caspr(p=math.inf, method=method), grads)
    assert_close(ours, last(fp.shampoo(method=method), grads), rtol=1e-10)


def test_higher_powers_approach_shampoo_halving_the_distance():
    """CA-7 and X-4."""
    grads = decaying((4, 3), 2)
    shampoo = preconditioner(InverseRoot(1e-3), grads)
    distance = [
        (preconditioner(KroneckerSum(1e-3, p), grads) - shampoo).norm() for p in (8, 16, 32, 256)
    ]
    assert distance[0] / distance[1] == pytest.approx(2, rel=0.2)
    assert distance[1] / distance[2] == pytest.approx(2, rel=0.1)
    assert distance[3] < 0.02 * shampoo.norm()


def test_the_first_power_is_the_mean_of_the_one_sided_methods():
    """X-4."""
    grads = decaying((4, 3), 1)
    left, right = (reference.ridge(s, EPSILON) for s in reference.mode_grams(grads))
    expected = (
        reference.power(left, -0.5) @ grads[-1] + grads[-1] @ reference.power(right, -0.5)
    ) / 2
    assert_close(last(fp.caspr(p=1), grads), expected, rtol=1e-8)


def test_on_vectors_caspr_is_shampoo(randn):
    """X-1, in the library's form: vectors have diagonal AdaGrad in both."""
    grads = [randn(5) for _ in range(4)]
    assert_close(last(fp.caspr(), grads), last(fp.shampoo(), grads), rtol=1e-13)


def test_one_long_axis_by_dense_factors_is_full_adagrad(randn):
    """X-1, the statement itself: the inverse root of a vector's own Gram matrix."""
    grads = [randn(5) for _ in range(7)]
    opt = fp.compose(
        fp.curvature.gradient.BatchGradient(), Dense, InverseRoot(EPSILON), decay="sum"
    )
    expected = reference.adagrad_full(grads, EPSILON) @ grads[-1]
    assert_close(last(opt, grads), expected, rtol=1e-8)


@pytest.mark.parametrize(("l", "r"), [(4.0, 4.0), (4.0, 0.25)])
def test_isotropic_factors_have_their_closed_form(l, r, randn):
    """X-11."""
    rep = kronecker_dim(l * reference.eye(4), r * reference.eye(3))
    g, solver = randn(4, 3), KroneckerSum(1e-14)
    direction = solver.apply(solver.prepare(rep, solver.init(rep)), {"w": g})["w"]
    assert_close(direction, g * ((l**-0.25 + r**-0.25) / 2) ** 2, rtol=1e-10)


def test_scaling_one_factor_changes_the_direction_itself():
    """SH-5's counterpart: the relative scale of the axes matters here."""
    grads = decaying((4, 3), 0)
    left, right = reference.mode_grams(grads)
    solver, directions = KroneckerSum(1e-6), []
    for c in (1.0, 256.0):
        rep = kronecker_dim(left, c * right)
        directions.append(
            solver.apply(solver.prepare(rep, solver.init(rep)), {"w": grads[-1]})["w"]
        )
    x, y = (d.reshape(-1) for d in directions)
    assert torch.nn.functional.cosine_similarity(x, y, dim=0) < 0.999


def test_grafting_makes_its_global_scale_irrelevant(randn):
    """CA-10: the factor 1/4 of the slides and the ports is absorbed."""
    g = {"w": randn(4, 3)}
    quadrupled = fp.chain(fp.caspr(), fp.scale(4.0))
    first, second = (
        opt.update(opt.init(g), g)[1]
        for opt in (fp.graft(fp.caspr(), fp.sgd()), fp.graft(quadrupled, fp.sgd()))
    )
    assert_close(first, second, rtol=1e-12)


def test_a_long_tensor_in_float32_agrees_with_float64():
    grads = decaying((6, 5), 3)
    wide = last(fp.caspr(), grads)
    narrow = last(fp.caspr(), [g.float() for g in grads])
    assert_close(narrow.double(), wide, rtol=1e-3)
