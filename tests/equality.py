"""Comparing trees of tensors."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_map

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def copy(tree):
    """The same tree with its own memory."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)


def assert_same(x, y) -> None:
    """Bit for bit: structure, dtypes, shapes and values (a NaN equals a NaN)."""
    assert tree_flatten(x)[1] == tree_flatten(y)[1]
    for (path, a), b in zip(tree_flatten_with_path(x)[0], tree_flatten(y)[0], strict=True):
        assert a.dtype == b.dtype, path
        assert a.shape == b.shape, path
        assert torch.equal(a.isnan(), b.isnan()), path
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), path


def assert_close(x, y, rtol: float = 1e-10, atol: float | None = None) -> None:
    """Equal structure, and values within ``rtol`` of the largest entry of each tensor."""
    assert tree_flatten(x)[1] == tree_flatten(y)[1]
    for (path, a), b in zip(tree_flatten_with_path(x)[0], tree_flatten(y)[0], strict=True):
        assert a.shape == b.shape, path
        scale = b.double().abs().max().item() if b.numel() else 0.0
        bound = rtol * max(scale, 1e-8) if atol is None else atol
        error = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        assert error <= bound, f"{path}: error {error:.3g} above {bound:.3g}"


def finite(tree) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in tree_flatten(tree)[0])
