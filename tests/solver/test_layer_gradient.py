"""The solvers of Kronecker-factored curvature against dense solves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcprecond as fp
from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.representation.kronecker_io import KroneckerIO
from funcprecond.solver.cholesky import Cholesky, pi
from funcprecond.solver.eigen import Eigen
from funcprecond.solver.layer_gradient import GRADIENT_ROWS, gradient_rows
from tests import problems, reference


def spd(n, seed):
    x = problems.normal((n, n + 1), seed)
    return x @ x.T


def representation(left, right, weight=1.0):
    return KroneckerIO(
        {"w+b": left}, {"w+b": right}, {}, {}, torch.tensor(weight, dtype=torch.float64), ("w", "b")
    )


def gradient(shape, seed=9):
    w = problems.normal((shape[0], *shape[1:]), seed)
    return {"w": w, "b": problems.normal((shape[0],), seed + 1)}


def flat(tree):
    return torch.cat([tree["w"].flatten(1), tree["b"].unsqueeze(1)], 1).reshape(-1)


@given(st.integers(1, 5), st.integers(1, 5), st.floats(1e-6, 10.0), st.floats(0.1, 1.0))
def test_eigen_inverts_the_damped_product_exactly(o, i, damping, weight):
    left, right = spd(o, 1), spd(i + 1, 2)
    rep = representation(weight * left, weight * right, weight)
    solver = Eigen(damping)
    grads = gradient((o, i))
    direction = solver.apply(solver.prepare(rep, solver.init(rep)), grads)
    matrix = reference.kron(left, right) + damping * reference.eye(o * (i + 1))
    torch.testing.assert_close(flat(direction), torch.linalg.solve(matrix, flat(grads)))


@pytest.mark.parametrize("solver", [Eigen(0.1), Cholesky(0.1), Cholesky(0.1, invert=False)])
def test_groups_are_solved_one_by_one(solver):
    left = torch.stack([spd(2, 1), spd(2, 2)])
    right = torch.stack([spd(10, 3), spd(10, 4)])
    grads = gradient((4, 1, 3, 3))
    rep = representation(left, right)
    direction = solver.apply(solver.prepare(rep, solver.init(rep)), grads)
    for j in range(2):
        part = {k: g[2 * j : 2 * j + 2] for k, g in grads.items()}
        rep = representation(left[j], right[j])
        alone = solver.apply(solver.prepare(rep, solver.init(rep)), part)
        for k in part:
            torch.testing.assert_close(direction[k][2 * j : 2 * j + 2], alone[k])


@pytest.mark.parametrize("invert", [True, False])
@pytest.mark.parametrize("split", ["pi", "equal"])
def test_cholesky_inverts_the_factored_damping(split, invert):
    left, right, damping = spd(3, 1), spd(4, 2), 0.3
    ratio = 1.0
    if split == "pi":
        ratio = ((right.trace() / 4) / (left.trace() / 3)).sqrt()
    solver = Cholesky(damping, split, invert)
    grads = gradient((3, 3))
    rep = representation(left, right)
    direction = solver.apply(solver.prepare(rep, solver.init(rep)), grads)
    matrix = reference.kron(
        left + damping**0.5 / ratio * reference.eye(3),
        right + damping**0.5 * ratio * reference.eye(4),
    )
    torch.testing.assert_close(flat(direction), torch.linalg.solve(matrix, flat(grads)))


@given(st.floats(1e-3, 1e3))
def test_pi_makes_the_result_blind_to_how_scale_is_shared(scale):
    solver, grads = Cholesky(0.1, "pi"), gradient((3, 3))
    results = []
    for s in (1.0, scale):
        rep = representation(spd(3, 1) / s, spd(4, 2) * s)
        results.append(flat(solver.apply(solver.prepare(rep, solver.init(rep)), grads)))
    torch.testing.assert_close(*results)


def test_pi_is_one_where_a_factor_is_zero():
    assert float(pi(spd(3, 1), torch.zeros(2, 2, dtype=torch.float64))) == 1.0


def test_a_singular_float32_factor_without_damping_still_has_a_finite_solve():
    rep = KroneckerIO(
        {"w": torch.ones(8, 8)}, {"w": torch.ones(8, 8)}, {}, {}, torch.ones(()), ("w",)
    )
    solver = Cholesky(0.0)
    direction = solver.apply(solver.prepare(rep, solver.init(rep)), {"w": torch.ones(8, 8)})
    assert torch.isfinite(direction["w"]).all()


def test_a_diagonal_left_factor_divides_rows():
    frequency, right = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64), spd(4, 2)
    rep = KroneckerIO(
        {"w": frequency}, {"w": right}, {}, {}, torch.ones((), dtype=torch.float64), ("w",)
    )
    grads = {"w": problems.normal((3, 4))}
    joint = Eigen(0.2).apply(Eigen(0.2).prepare(rep, Eigen().init(rep)), grads)["w"]
    for v in range(3):
        matrix = frequency[v] * right + 0.2 * reference.eye(4)
        torch.testing.assert_close(joint[v], torch.linalg.solve(matrix, grads["w"][v]))


@pytest.mark.parametrize(
    "solver", [Eigen(0.1), Cholesky(0.1), Cholesky(0.1, invert=False), Cholesky(0.1, "equal")]
)
def test_rows_of_the_gradient_give_the_same_direction_as_the_gradient(solver):
    model = problems.initialised(torch.nn.Sequential(torch.nn.Linear(9, 8), torch.nn.Linear(8, 7)))
    problem = fp.problem(model, fp.losses.cross_entropy)
    batch = (problems.normal((2, 9)), torch.tensor([3, 5]))
    need = LayerStatistics("exact")
    evidence = fp.observe(problem, problem.params, batch, (need, GRADIENT_ROWS))
    rep = KroneckerIO.init(problem.params).accumulate(evidence[need], None)
    factor = solver.prepare(rep, solver.init(rep))
    rows = gradient_rows(evidence.grads, evidence)
    assert rows is not None
    dense = solver.apply(factor, evidence.grads)
    few = solver.apply(factor, evidence.grads, evidence)
    for k in dense:
        torch.testing.assert_close(few[k], dense[k])
    changed = {k: 2 * g for k, g in evidence.grads.items()}
    assert gradient_rows(changed, evidence) is None


def test_norm_units_and_the_rest_are_solved_by_their_own_blocks():
    units = torch.stack([spd(2, 1), spd(2, 2)])
    rep = KroneckerIO(
        {}, {}, {"w+b": units}, {"s": torch.tensor([3.0], dtype=torch.float64)},
        torch.ones((), dtype=torch.float64), ("w", "b", "s", "free"),
    )  # fmt: skip
    grads = {k: problems.normal((n,), n) for k, n in {"w": 2, "b": 2, "s": 1, "free": 3}.items()}
    for solver in (Eigen(0.1), Cholesky(0.1)):
        direction = solver.apply(solver.prepare(rep, solver.init(rep)), grads)
        for u in range(2):
            g = torch.stack([grads["w"][u], grads["b"][u]])
            solved = torch.linalg.solve(units[u] + 0.1 * reference.eye(2), g)
            torch.testing.assert_close(torch.stack([direction["w"][u], direction["b"][u]]), solved)
        torch.testing.assert_close(direction["s"], grads["s"] / 3.1)
        assert direction["free"] is grads["free"]


@pytest.mark.parametrize("split", ["pi", "equal"])
@pytest.mark.parametrize("labels", ["mc", "exact", "empirical"])
def test_factors_kept_as_rows_have_the_solution_of_the_matrices(split, labels):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 20, 3, groups=2),
        torch.nn.Tanh(),
        torch.nn.Flatten(),
        torch.nn.Linear(20, 7),
    )
    problem = fp.problem(problems.initialised(model), fp.losses.cross_entropy)
    batch = (problems.normal((3, 2, 3, 3)), torch.tensor([3, 5, 0]))
    need = LayerStatistics(labels)
    evidence = fp.observe(problem, problem.params, batch, (need,), generator=problems.seeded(0))
    solver, found = Cholesky(0.1, split), []
    for rows in (True, False):
        rep = KroneckerIO.init(problem.params, thin=rows).accumulate(evidence[need], None)
        found.append(solver.apply(solver.prepare(rep, solver.init(rep)), evidence.grads))
        assert (rep.right["3.weight+3.bias"].shape == (3, 21)) == rows
    for k in found[0]:
        torch.testing.assert_close(found[0][k], found[1][k])
    torch.testing.assert_close(
        *(
            KroneckerIO.init(problem.params, thin=rows)
            .accumulate(evidence[need], None)
            .block("0.weight+0.bias")
            for rows in (True, False)
        )
    )
