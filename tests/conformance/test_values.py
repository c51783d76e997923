"""A module equals the same plain function; float64 equals the dense reference."""

import pathlib
import subprocess
import sys

import pytest
import torch

from tests import problems, reference
from tests.conformance.methods import METHODS, build, every_method, line, trained
from tests.equality import assert_close

ROOT = pathlib.Path(__file__).parents[2]


@every_method
def test_a_module_trains_as_the_same_plain_function(name):
    module = problems.train(problems.mlp(), trained(name), 3)
    function = problems.train(problems.mlp_function(), trained(name), 3)
    assert_close(module[:2], function[:2], rtol=1e-9)


@every_method
def test_the_first_direction_equals_the_dense_reference(name):
    if isinstance(line(name).reference, str):
        pytest.skip(f"{line(name).reference} pins it")
    toy = problems.mlp()
    _, direction, evidence = problems.update(toy, build(name, **line(name).dense))
    matrix = line(name).reference(toy.problem, toy.params, toy.batch)
    expected = reference.unravel(matrix @ reference.ravel(evidence.grads), toy.params)
    assert_close(direction, expected, rtol=1e-5)


def test_every_other_method_is_pinned_by_a_test_that_a_wrong_direction_fails():
    pins = {name: m.reference for name, m in METHODS.items() if isinstance(m.reference, str)}
    command = [sys.executable, "-m", "pytest", "-p", "tests.conformance.mutated", "-q", "-rf"]
    options = ["-m", "not slow", "--tb=no", "-p", "no:cacheprovider", "-n", "0"]
    result = subprocess.run(
        [*command, *options, *pins.values()], capture_output=True, text=True, cwd=ROOT, check=False
    )
    # 1: tests ran, and some failed. Anything else is a test that does not exist.
    assert result.returncode == 1, result.stdout + result.stderr
    failed = [x.split()[1] for x in result.stdout.splitlines() if x.startswith("FAILED ")]
    weak = {
        name: pin
        for name, pin in pins.items()
        if not any(test == pin or test.startswith(f"{pin}[") for test in failed)
    }
    assert not weak, f"these tests pass for a direction that is one per cent too long: {weak}"


@every_method
def test_float32_under_torchs_own_default_agrees_with_float64(name):
    _, wide, _ = problems.update(problems.mlp(torch.float64), build(name), steps=2)
    _, narrow, _ = problems.update(problems.mlp(torch.float32), build(name), steps=2)
    assert_close({k: d.double() for k, d in narrow.items()}, wide, rtol=2e-3)


@every_method
def test_the_default_dtype_has_no_influence(name):
    _, expected, _ = problems.update(problems.mlp(), build(name), steps=2)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        _, direction, _ = problems.update(problems.mlp(), build(name), steps=2)
    finally:
        torch.set_default_dtype(default)
    assert_close(direction, expected, rtol=1e-12)
