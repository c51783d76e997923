"""Which learning rate comes next, and which is best."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funcprecond.compare.sweep import EXTENSIONS, best, next_exponent, rate


def run(loss=None):
    if loss is None:
        return {"status": "diverged", "why": "the loss was not finite"}
    return {"status": "ok", "validation": {"loss": loss, "accuracy": 0.5}}


def order(losses, points=3):
    """Exponents in the order in which they are tried, given what each would reach."""
    results = {}
    while (exponent := next_exponent(results, points)) is not None:
        results[exponent] = run(losses.get(exponent))
    return list(results)


def test_centre_first_then_its_neighbours():
    assert order({-1: 0.5, 0: 0.1, 1: 0.5}) == [0, -1, 1]


def test_goes_on_where_the_best_is_at_the_edge_and_stops_when_it_is_not():
    assert order({-1: 0.5, 0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1}) == [0, -1, 1, 2, 3]
    assert order({-1: 0.1, 0: 0.2, 1: 0.3, -2: 0.2}) == [0, -1, 1, -2]


def test_tries_smaller_rates_while_everything_diverges():
    assert order({}) == [0, -1, 1, -2, -3]
    assert order({-2: 0.9}) == [0, -1, 1, -2, -3]


def test_one_point_is_the_methods_own_rate():
    assert order({0: 0.1}, points=1) == [0]


@given(st.dictionaries(st.integers(-6, 6), st.floats(0, 1)), st.sampled_from([1, 3, 5]))
def test_sweep_is_contiguous_and_bounded(losses, points):
    tried = order(losses, points)
    assert sorted(tried) == list(range(min(tried), max(tried) + 1))
    assert points <= len(tried) <= points + (EXTENSIONS if points > 1 else 0)


def test_best_has_the_least_validation_loss():
    assert best({0: run(0.4), 1: run(0.3), 2: run(0.5), 3: run()}) == 1
    assert best({0: run(), 1: run()}) is None


@pytest.mark.parametrize(("exponent", "expected"), [(0, 0.1), (1, 0.316), (-2, 0.01), (2, 1.0)])
def test_rates_are_half_decades(exponent, expected):
    assert rate(0.1, exponent) == expected
