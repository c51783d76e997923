"""Levenberg and Marquardt's rule as a pure function."""

import pytest
import torch

from funcprecond.linalg.levenberg_marquardt import levenberg_marquardt, reduction_ratio


def number(x):
    return torch.tensor(x, dtype=torch.float64)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (-1.0, 3.0), (0.1, 3.0), (0.25, 2.0), (0.5, 2.0), (0.75, 2.0),
        (0.76, 2.0 * (2 / 3)), (-torch.inf, 3.0), (torch.inf, 2.0 * (2 / 3)),
    ],
)  # fmt: skip
def test_the_damping_follows_the_ratio(ratio, expected):
    assert float(levenberg_marquardt(number(2.0), number(ratio))) == expected


def test_the_factors_are_the_methods_own_and_the_damping_is_kept_in_bounds():
    assert float(levenberg_marquardt(number(2.0), number(0.0), up=1.01)) == 2.02
    assert float(levenberg_marquardt(number(1e12), number(0.0))) == 1e12
    assert float(levenberg_marquardt(number(1e-12), number(1.0))) == 1e-12


def test_a_promise_of_ascent_or_a_bad_loss_counts_as_the_worst_ratio():
    assert float(reduction_ratio(number(-1.0), number(-2.0))) == 0.5
    for change, predicted in ((-1.0, 1.0), (torch.nan, -1.0), (torch.inf, -1.0)):
        assert float(reduction_ratio(number(change), number(predicted))) == -torch.inf
    assert float(reduction_ratio(number(-1.0), number(torch.nan))) == -torch.inf


def test_damping_stays_where_the_model_predicts_no_change():
    ratio = reduction_ratio(number(1e-9), number(0.0))
    assert float(levenberg_marquardt(number(2.0), ratio)) == 2.0
