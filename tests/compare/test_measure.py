"""Time and memory of a step."""

import torch

from funcprecond.compare.measure import allocations, cost, highest, storage_bytes
from funcprecond.compare.plan import settings
from funcprecond.compare.tasks import TASKS


def test_trace_sees_what_is_allocated_and_freed():
    with allocations() as changes:
        first = torch.empty(1000)
        second = torch.empty(5000)
        del second
        third = torch.empty(2000)
        del first, third
    assert [size for size in changes if abs(size) >= 4000] == [
        4000, 20000, -20000, 8000, -4000, -8000,
    ]  # fmt: skip
    assert highest(changes) == 24000


def test_views_count_their_storage_once():
    base = torch.zeros(10, 10)
    assert storage_bytes({"a": base, "b": base[0], "c": [base.T, 3]}) == 400


def row(method, **changes):
    arguments = {"batch_sizes": [64], "intervals": [2], "steps": 5} | changes
    return settings(
        TASKS["digits-mlp"], [method], arguments["batch_sizes"], arguments["intervals"],
        arguments["steps"], "cpu", 1,
    )[0]  # fmt: skip


def test_sgd_costs_what_sgd_costs(digits):
    result = cost(row("sgd"), digits)
    assert result["memory_ratio"] == 1
    assert result["rounds"] >= 5
    assert result["time_ratio"] == result["step_ms"] / result["sgd_step_ms"]
    # Parameters and momentum, which are the parameters' size.
    weights = 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10
    assert result["state_bytes"] >= 4 * weights
    assert result["peak_bytes"] > 3 * 4 * weights


def test_second_moments_take_more_memory_than_sgd(digits):
    adam, shampoo = cost(row("adam"), digits), cost(row("shampoo"), digits)
    assert adam["state_bytes"] > 0
    assert adam["memory_ratio"] > 1
    assert shampoo["memory_ratio"] > adam["memory_ratio"]
    assert shampoo["time_ratio"] > 1
