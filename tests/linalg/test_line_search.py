"""Line searches and backtracking on hand-made losses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprecond.linalg.line_search import armijo, backtrack, wolfe

BOTH = pytest.mark.parametrize("eager", [True, False])


def number(x):
    return torch.tensor(x, dtype=torch.float64)


@BOTH
@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ([0.5, 0.1], 1.0),
        ([2.0, 1.0, 0.9], 0.25),
        ([torch.nan, torch.inf, 0.9], 0.25),
        ([0.995, 0.9], 0.5),  # less than 1e-2 of descent at 1
        ([2.0, 2.0, 2.0], 0.0),
    ],
)
def test_armijo_takes_the_first_with_enough_descent(table, expected, eager):
    calls = []

    def loss_at(factor):
        calls.append(float(factor))
        return number(table[min(len(calls), len(table)) - 1])

    found = armijo(loss_at, number(1.0), number(-1.0), c1=1e-2, trials=3, eager=eager)
    assert float(found) == expected
    tried = {1.0: 1, 0.5: 2}.get(expected, 3)
    assert len(calls) == (tried if eager else 3)


@BOTH
@pytest.mark.parametrize("slope", [0.0, 1.0, torch.nan])
def test_nothing_is_accepted_along_a_line_that_does_not_descend(slope, eager):
    assert float(armijo(lambda a: number(-9.0), number(0.0), number(slope), eager=eager)) == 0
    far = lambda a: (number(-9.0), number(0.0))  # noqa: E731
    assert float(wolfe(far, number(0.0), number(slope), eager=eager)) == 0


@BOTH
@given(st.floats(-6, 6), st.floats(0.1, 4.0))
def test_wolfe_finds_a_point_with_both_conditions(eager, exponent, power):
    # f(a) = (a - m)² / 2 bent by a quartic term; m over twelve powers of two.
    m = 2.0**exponent

    def evaluate(a):
        return (a - m) ** 2 / 2 + power * ((a - m) / m) ** 4, (a - m) + 4 * power * (
            a - m
        ) ** 3 / m**4

    loss, slope = evaluate(number(0.0))
    found = wolfe(evaluate, loss, slope, trials=30, eager=eager)
    value, derivative = evaluate(found)
    assert value <= loss + 1e-4 * found * slope
    assert derivative.abs() <= 0.9 * slope.abs()


@BOTH
def test_wolfe_out_of_trials_returns_what_descends(eager):
    def falling(a):
        return -a, number(-1.0)

    assert float(wolfe(falling, number(0.0), number(-1.0), trials=3, eager=eager)) == 4.0


@BOTH
@pytest.mark.parametrize(
    ("table", "last", "expected"),
    [
        ([5.0, 4.0, 3.0], 2.0, 3),
        ([5.0, 1.0, 2.0], 3.0, 1),
        ([1.0, 5.0, 2.0], 3.0, 2),
        ([1.0, 2.0, 3.0], 4.0, 0),
        ([1.0, 2.0, 3.0], torch.nan, 0),
        ([1.0, torch.nan, 3.0], 4.0, 2),
        ([1.0, 2.0, torch.inf], torch.inf, 0),
        ([3.0, 3.0, 3.0], 3.0, 3),
    ],
)
def test_backtracking_goes_on_while_the_loss_falls(table, last, expected, eager):
    counts = torch.tensor([True] * 3)
    index, best = backtrack(lambda j: number(table[j]), counts, number(last), eager=eager)
    assert int(index) == expected
    assert float(best) == [*table, last][expected]


@BOTH
def test_backtracking_passes_over_what_does_not_count(eager):
    counts = torch.tensor([True, True, False])
    index, _ = backtrack(lambda j: number([1.0, 2.0, 9.0][j]), counts, number(3.0), eager=eager)
    assert int(index) == 0
    nothing = torch.tensor([False] * 3)
    assert int(backtrack(lambda j: number(0.0), nothing, number(3.0), eager=eager)[0]) == 3
