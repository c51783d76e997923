"""The page of torch's faults says of this torch what is true of it."""

import re
from pathlib import Path

import pytest
import torch

from tests import torch_faults
from tests.problems import normal
from tests.torch_faults import FAULTS, difference, thrice, twice

PAGE = (Path(__file__).parents[1] / "docs" / "torch-faults.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("| ")
]


def named(state: str) -> str:
    """A state without the size of the error, which may depend on the machine."""
    return re.sub(r" by .*|\(.*", "", state).strip()


def test_the_page_has_every_fault_in_order():
    assert [row[0] for row in ROWS[1:]] == [fault.title for fault in FAULTS.values()]
    assert {named(state) for row in ROWS[1:] for state in row[2:]} == {"right", "wrong", "missing"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow, pytest.mark.compile] if one.compiles else [])
        for name, one in FAULTS.items()
    ],
)
def test_the_page_is_true_of_this_torch(name):
    version = torch_faults.version()
    if version not in ROWS[0]:
        pytest.skip(f"docs/torch-faults.md has no column for torch {version}")
    (row,) = (row for row in ROWS if row[0] == FAULTS[name].title)
    expected = row[ROWS[0].index(version)]
    assert named(FAULTS[name].found()) == named(expected), "run make torch-faults"


def test_the_references_find_right_derivatives_right_and_wrong_ones_wrong():
    x, v = normal((3, 2), 1), normal((3, 2), 2)
    for found, right in (
        twice(lambda x: x.sin().sum(), x, v),
        thrice(lambda x: x.sin().sum(), x, v),
    ):
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(difference(torch.sin, x, v), x.cos() * v, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        thrice(lambda x: x.sin().sum(), x, v)[1], -x.cos() * v**2, rtol=1e-6, atol=1e-8
    )

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * (x.cos().detach() + 0.5 * (x.cos() - x.cos().detach()))

    found, right = twice(lambda x: Wrong.apply(x).sum(), x, v)
    torch.testing.assert_close(found, right / 2, rtol=1e-6, atol=1e-8)
