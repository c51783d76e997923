"""SKFAC against dense solves with K-FAC's factors of the batch, from hooks and plain autograd."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import funcprecond as fp
from tests import problems, reference
from tests.equality import assert_same
from tests.methods.layer_rows import layer_rows, matrix
from tests.problems import Toy, initialised, normal
from tests.strategies import seeds

LAM = 0.07


def toy(module, inputs, classes):
    labels = torch.arange(len(inputs)) % classes
    return Toy(fp.problem(initialised(module), fp.losses.cross_entropy), ((inputs, labels),))


class Sequence(nn.Module):
    """Linear layers at the positions of a sequence, and a norm layer."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 3)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).tanh().mean(1))


def conv(**options):
    module = nn.Sequential(
        nn.Conv2d(4, 6, 2, **options), nn.Tanh(), nn.Flatten(), nn.LazyLinear(8), nn.Linear(8, 3)
    )
    inputs = normal((3, 4, 5, 5))
    module.double()(inputs)
    return toy(module, inputs, 3)


CASES = {
    "wide": lambda: toy(
        nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3)), normal((4, 9)), 3
    ),
    "sequence": lambda: toy(Sequence(), normal((4, 2, 7)), 3),
    "conv": lambda: conv(stride=2, padding=1),
    "conv dilation": lambda: conv(dilation=2),
    "conv groups": lambda: conv(groups=2, stride=2),
}


def solved(a, g, gradient, split, sharing):
    """Dense K-FAC of one batch: the rows (N, T, .), and ``[W | b]`` of the gradient."""
    n = len(a)
    a = a.mean(1) if sharing == "reduce" else a.flatten(0, 1)
    g = g.sum(1) if sharing == "reduce" else g.flatten(0, 1)
    right, left = a.T @ a / len(a), g.T @ g / n
    pi = (right.trace() / len(right) / (left.trace() / len(left))).sqrt() if split == "pi" else 1.0
    left = left + LAM**0.5 / pi * reference.eye(len(left))
    right = right + LAM**0.5 * pi * reference.eye(len(right))
    return torch.linalg.solve(reference.kron(left, right), gradient.reshape(-1)).view_as(gradient)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("split", ["pi", "equal"])
@pytest.mark.parametrize("sharing", ["reduce", "expand"])
def test_the_direction_is_the_dense_solve_with_both_factors(case, split, sharing):
    case = CASES[case]()
    options = {"damping_split": split, "sharing": sharing, "labels": "empirical"}
    state, direction, evidence = problems.update(case, fp.skfac(damping=LAM, **options))
    rows = layer_rows(case)
    assert any(x.shape[-2] < x.shape[-1] for x in state.representation.right.values())
    for name, (a, g) in rows.items():
        if name == "norm":
            continue
        gradient, found = (matrix(x, name, len(a)) for x in (evidence.grads, direction))
        for j in range(len(a)):
            expected = solved(a[j], g[j], gradient[j], split, sharing)
            torch.testing.assert_close(found[j], expected, rtol=1e-9, atol=1e-11)


def test_a_norm_layer_gets_exact_blocks_of_its_units():
    case = CASES["sequence"]()
    _, direction, evidence = problems.update(case, fp.skfac(damping=LAM, labels="empirical"))
    x, g = (r[0] for r in layer_rows(case)["norm"])
    rows = torch.stack([(g * x).sum(1), g.sum(1)], -1)
    for unit in range(rows.shape[1]):
        u = rows[:, unit]
        gradient, found = (
            torch.stack([t["norm.weight"][unit], t["norm.bias"][unit]])
            for t in (evidence.grads, direction)
        )
        expected = torch.linalg.solve(u.T @ u / len(u) + LAM * reference.eye(2), gradient)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@given(seeds, st.integers(1, 12), st.integers(1, 9), st.integers(2, 9))
def test_at_every_size_of_batch_and_layer_it_is_the_same_matrix(seed, n, inputs, outputs):
    """Fewer rows than columns, as many, and more."""
    module = initialised(nn.Sequential(nn.Linear(inputs, outputs)), seed)
    batch = (normal((n, inputs), seed + 1), normal((n, outputs), seed + 2))
    case = Toy(fp.problem(module, fp.losses.MSE(reduction="sum")), (batch,))
    whole = fp.kfac(damping=LAM, damping_split="pi", labels="empirical", decay=0.0)
    opt = fp.skfac(damping=LAM, labels="empirical")
    expected, found = (problems.update(case, x)[1] for x in (whole, opt))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_small_damping_loses_no_digits_where_the_batch_spans_the_gradient():
    """Rounding in ``(I - U^T W) / r`` grows as 1 / r, and stays small at the dampings in use."""
    module = initialised(nn.Sequential(nn.Linear(60, 50)), dtype=torch.float32)
    batch = (normal((6, 60), 1, torch.float32), torch.arange(6))
    opt = fp.skfac(damping=1e-6, labels="empirical")
    narrow = problems.update(Toy(fp.problem(module, fp.losses.cross_entropy), (batch,)), opt)[1]
    module, batch = module.double(), (batch[0].double(), batch[1])
    wide = problems.update(Toy(fp.problem(module, fp.losses.cross_entropy), (batch,)), opt)[1]
    for k, x in wide.items():
        assert (narrow[k].double() - x).norm() < 1e-3 * x.norm()


def test_the_state_is_linear_in_the_width_and_lasts_for_an_interval():
    case = CASES["wide"]()
    opt = fp.skfac(every=3, start=2, labels="empirical")
    state, states = opt.init(case.params), []
    for t in range(7):
        batch = (normal((4, 9), t), case.batch[1])
        evidence = fp.observe(case.problem, case.params, batch, opt.needs(t))
        state, _ = opt.update(state, evidence.grads, evidence)
        states.append(state)
    assert state.representation.right["0.weight+0.bias"].shape == (4, 10)
    assert state.factor.right["0.weight+0.bias"].shape == (4, 10)
    assert state.representation.left["0.weight+0.bias"].shape == (4, 8)
    new = [not _same(x.factor, y.factor) for x, y in itertools.pairwise(states)]
    assert new == [True, False, True, False, False, True]


def _same(x, y):
    try:
        assert_same(x, y)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize(
    "wrong", [{"damping_split": "joint"}, {"labels": "model"}, {"samples": 0}, {"damping": 0.0}]
)
def test_wrong_options_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        fp.skfac(**wrong)
