"""What numbers are kept and computed in: at least float32, and float64 where the device has it."""

import torch
from torch import Tensor

__all__ = ["decomposition_dtype", "factor_dtype", "wide", "wide_dtype"]

# Apple's GPUs.
WITHOUT_FLOAT64 = {"mps"}


def factor_dtype(p: Tensor) -> torch.dtype:
    """The dtype of statistics of ``p``: float32, or float64 if ``p`` has it."""
    return torch.promote_types(p.dtype, torch.float32)


def wide_dtype(x: Tensor) -> torch.dtype:
    """float64, or float32 where the device of ``x`` has no other."""
    return torch.float32 if x.device.type in WITHOUT_FLOAT64 else torch.float64


def wide(x: Tensor) -> Tensor:
    """The numbers in :func:`wide_dtype`."""
    return x.to(wide_dtype(x))


def decomposition_dtype(x: Tensor) -> torch.dtype:
    """In what a matrix is decomposed: float64 on a CPU, elsewhere its own, at least float32."""
    return torch.float64 if x.device.type == "cpu" else factor_dtype(x)
