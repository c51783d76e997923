"""What hypothesis draws: shapes, options and an integer seed; tensors are built from the seed."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests import problems

seeds = st.integers(0, 2**20)
dtypes = st.sampled_from([torch.float32, torch.float64])
sizes = st.integers(1, 4)
axes = st.lists(st.integers(1, 4), min_size=0, max_size=4).map(tuple)
shapes = st.lists(axes, min_size=1, max_size=3).map(
    lambda list_: {f"p{i}": shape for i, shape in enumerate(list_)}
)


def orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(problems.normal((n, n), seed))[0]


def with_spectrum(values: Tensor, seed: int) -> Tensor:
    """A symmetric matrix with these eigenvalues in a random basis."""
    q = orthogonal(len(values), seed)
    return (q * values) @ q.T


@st.composite
def spd(draw, max_size: int = 6, max_condition: float = 1e4) -> Tensor:
    """A symmetric positive definite float64 matrix with a drawn size, condition and magnitude."""
    n = draw(st.integers(1, max_size))
    condition = draw(st.sampled_from([1.0, 10.0, max_condition]))
    magnitude = draw(st.sampled_from([1e-6, 1.0, 1e6]))
    values = magnitude * torch.logspace(0, -1, n, base=condition, dtype=torch.float64)
    return with_spectrum(values, draw(seeds))


@st.composite
def vectors(draw, max_size: int = 6) -> dict[str, Tensor]:
    """A parameter tree of drawn shapes."""
    seed = draw(seeds)
    return {
        k: problems.normal(shape, seed + i) for i, (k, shape) in enumerate(draw(shapes).items())
    }


@st.composite
def gradients(draw, max_axes: int = 3, steps: int = 3) -> list[Tensor]:
    """A few gradients of one tensor with at least two axes longer than 1, of decaying scales."""
    shape = tuple(draw(st.lists(st.integers(2, 4), min_size=2, max_size=max_axes)))
    seed = draw(seeds)
    decay = torch.ones(shape, dtype=torch.float64)
    for axis, n in enumerate(shape):
        view = [1] * len(shape)
        view[axis] = n
        decay = decay * (0.5 ** torch.arange(n, dtype=torch.float64)).reshape(view)
    return [decay * problems.normal(shape, seed + i) for i in range(steps)]
