"""The dtypes of statistics and of computations: at least float32, and float64 where it exists."""

import torch
from torch import Tensor

__all__ = ["decomposition_dtype", "factor_dtype", "wide", "wide_dtype"]

# The devices that do not support float64: Apple's GPUs.
WITHOUT_FLOAT64 = {"mps"}


def factor_dtype(p: Tensor) -> torch.dtype:
    """The dtype of statistics of ``p``: that of ``p``, but at least float32."""
    return torch.promote_types(p.dtype, torch.float32)


def wide_dtype(x: Tensor) -> torch.dtype:
    """float64, or float32 if the device of ``x`` does not support float64."""
    return torch.float32 if x.device.type in WITHOUT_FLOAT64 else torch.float64


def wide(x: Tensor) -> Tensor:
    """``x`` in :func:`wide_dtype`."""
    return x.to(wide_dtype(x))


def decomposition_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which ``x`` is decomposed: float64 on a CPU, :func:`factor_dtype` elsewhere."""
    return torch.float64 if x.device.type == "cpu" else factor_dtype(x)
