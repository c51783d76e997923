"""Norm layers written out: the values of torch's, and derivatives of any order."""

import pytest
import torch
import torch.nn.functional as F

import funcprecond as fp
from funcprecond.autodiff.rules.norms import NORMS
from tests.equality import assert_close
from tests.problems import normal

CASES = {
    "layer": (
        F.layer_norm,
        lambda: (normal((2, 3, 4)), (4,), 1 + normal((4,), 1), normal((4,), 2)),
    ),
    "layer, two axes": (F.layer_norm, lambda: (normal((2, 3, 4)), (3, 4))),
    "rms": (F.rms_norm, lambda: (normal((2, 3, 4)), (4,), 1 + normal((4,), 1), 0.1)),
    "rms, eps of the dtype": (F.rms_norm, lambda: (normal((2, 4)), (4,))),
    "group": (F.group_norm, lambda: (normal((2, 4, 3)), 2, 1 + normal((4,), 1), normal((4,), 2))),
    "batch": (
        F.batch_norm,
        lambda: (
            normal((3, 4, 2)),
            normal((4,), 3),
            normal((4,), 4).exp(),
            normal((4,)),
            None,
            True,
        ),
    ),
    "batch, no buffers": (F.batch_norm, lambda: (normal((3, 4)), None, None, None, None, True)),
    "batch, eval": (
        F.batch_norm,
        lambda: (
            normal((3, 4)),
            normal((4,), 3),
            normal((4,), 4).exp(),
            normal((4,)),
            normal((4,)),
        ),
    ),
    "instance": (
        F.instance_norm,
        lambda: (normal((2, 3, 5)), normal((3,), 3), normal((3,), 4).exp(), normal((3,))),
    ),
    "instance, eval": (
        F.instance_norm,
        lambda: (normal((2, 3, 5)), normal((3,), 3), normal((3,), 4).exp(), None, None, False),
    ),
}
every_case = pytest.mark.parametrize(("function", "arguments"), CASES.values(), ids=list(CASES))


def in_dtype(arguments, dtype):
    return [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in arguments]


@every_case
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)]
)
def test_values_and_running_statistics_are_torchs(function, arguments, dtype, rtol):
    ours, theirs = in_dtype(arguments(), dtype), in_dtype(arguments(), dtype)
    found, expected = NORMS[function](*ours), function(*theirs)
    assert found.dtype == expected.dtype
    assert_close(found, expected, rtol=rtol, atol=rtol)
    tensors = [[x for x in side if isinstance(x, torch.Tensor)] for side in (ours, theirs)]
    assert_close(*tensors, rtol=rtol, atol=rtol)


@every_case
def test_the_derivative_of_a_hessian_product_is_that_of_differences(function, arguments):
    x, *rest = arguments()
    v, u = normal(x.shape, 7), normal(x.shape, 8)

    def f(p):
        return function(p["x"], *rest).tanh().square().sum()

    def along(s):
        return (fp.hvp(f, {"x": x + s * u}, {"x": v})["x"] * v).sum()

    found = torch.func.grad(along)(torch.zeros((), dtype=torch.float64))
    expected = (along(1e-5) - along(-1e-5)) / 2e-5
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "shape"), [(F.batch_norm, (1, 2)), (F.instance_norm, (1, 2, 1))]
)
def test_statistics_of_a_single_value_are_refused(function, shape):
    with pytest.raises(ValueError, match="more than one value"):
        NORMS[function](torch.zeros(shape), None, None, None, None, True)
