"""A module equals the same plain function; float64 equals the dense reference."""

import pytest
import torch

from tests import problems, reference
from tests.conformance.methods import build, every_method, line, trained
from tests.equality import assert_close


@every_method
def test_a_module_trains_as_the_same_plain_function(name):
    module = problems.train(problems.mlp(), trained(name), 3)
    function = problems.train(problems.mlp_function(), trained(name), 3)
    assert_close(module[:2], function[:2], rtol=1e-9)


@every_method
def test_the_first_direction_equals_the_dense_reference(name):
    if line(name).reference is None:
        pytest.skip(f"tests/methods/test_{name}.py holds it to a dense reference")
    toy = problems.mlp()
    _, direction, evidence = problems.update(toy, build(name, **line(name).dense))
    matrix = line(name).reference(toy.problem, toy.params, toy.batch)
    expected = reference.unravel(matrix @ reference.ravel(evidence.grads), toy.params)
    assert_close(direction, expected, rtol=1e-5)


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
