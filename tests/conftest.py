"""What every test can rely on: one thread, no chance, and torch's default dtype as users have it.

Tests build float64 tensors explicitly. A default of float64 would hide exactly the errors that only
a float64 user under torch's own default sees, such as a scalar that was rounded to float32 on the
way.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from funcprecond.step import COMPILES

torch.set_num_threads(1)

for _name, _examples in {"dev": 20, "ci": 50, "many": 2000}.items():
    settings.register_profile(
        _name,
        max_examples=_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_collection_modifyitems(items):
    if tuple(int(x) for x in torch.__version__.split(".")[:2]) < COMPILES:
        for item in items:
            if item.get_closest_marker("compile"):
                item.add_marker(pytest.mark.skip(reason="torch's compiler is too old"))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seeded():
    """Modules initialise themselves from torch's global generator: the same in every test."""
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.fixture
def randn(generator):
    """``randn(3, 4)``: standard normal float64 numbers from the test's own generator."""

    def draw(*shape, dtype=torch.float64):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw
