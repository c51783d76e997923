import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcprecond.representation import average
from tests.equality import assert_close
from tests.problems import normal


def carried(values, decay):
    kept = average.Average({"x": (torch.zeros_like(values[0]),)}, values[0].new_zeros(()))
    for x in values:
        kept = kept.include({"x": (x,)}, decay)
    return kept.value()["x"][0]


@given(st.floats(0, 0.99), st.integers(1, 8))
def test_an_average_is_the_normalised_weighted_sum(decay, n):
    values = [normal((3,), i) for i in range(n)]
    weights = torch.tensor([decay ** (n - 1 - i) for i in range(n)], dtype=torch.float64)
    expected = sum(w * x for w, x in zip(weights, values, strict=True)) / weights.sum()
    assert_close(carried(values, decay), expected, rtol=1e-10)


@given(st.floats(0, 0.999))
def test_an_average_of_equal_values_is_that_value_from_the_first_step(decay):
    x = normal((3,), 0)
    assert_close(carried([x] * 5, decay), x, rtol=1e-10)


@given(st.floats(0, 0.99), st.integers(1, 30), st.booleans())
def test_a_rising_decay_is_one_minus_one_over_k_up_to_its_limit(limit, n, as_tensor):
    values = [normal((3,), i) for i in range(n)]
    expected = torch.zeros_like(values[0])
    for k, x in enumerate(values, 1):
        keep = min(1 - 1 / k, limit)
        expected = keep * expected + (1 - keep) * x
    limit = torch.tensor(limit, dtype=torch.float64) if as_tensor else limit
    assert_close(carried(values, average.RisingDecay(limit)), expected, rtol=1e-10, atol=1e-12)


def test_none_is_the_newest_and_sum_the_sum():
    values = [normal((3,), i) for i in range(4)]
    assert_close(carried(values, None), values[-1])
    assert_close(carried(values, "sum"), sum(values), rtol=1e-14)


def test_decay_zero_is_the_newest():
    values = [normal((3,), i) for i in range(4)]
    assert_close(carried(values, 0.0), carried(values, None))


def test_a_tensor_decays_as_a_number():
    values = [normal((3,), i) for i in range(4)]
    tensor = torch.tensor(0.9, dtype=torch.float64)
    assert_close(carried(values, tensor), carried(values, 0.9), rtol=1e-14)


def test_the_newest_takes_the_dtype_of_the_total():
    new = average.accumulate(torch.zeros(2), torch.ones(2, dtype=torch.bfloat16), None)
    assert new.dtype == torch.float32


@pytest.mark.parametrize(
    "decay", [None, "sum", 0.0, 0.999, torch.tensor(0.5), average.RisingDecay()]
)
def test_a_valid_decay_passes(decay):
    average.check_decay(decay)


@pytest.mark.parametrize("decay", [1.0, 1, -0.1, "mean", float("nan"), average.RisingDecay(1.0)])
def test_an_invalid_decay_is_shown(decay):
    with pytest.raises(ValueError, match="the weight of the old value, not"):
        average.check_decay(decay)
