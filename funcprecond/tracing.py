"""Whether anything watches what is computed, and wants torch's own rules for it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from funcprecond import tree

__all__ = ["is_watched", "untransformed"]


def is_watched() -> bool:
    """Whether a transform, a compiler or forward mode wants torch's own rules."""
    return torch.compiler.is_compiling() or tree.in_transform() or forward_ad._current_level >= 0


def untransformed(tensors: Any) -> bool:
    """Whether nothing watches: no compiler, no transform, no outer graph."""
    if is_watched():
        return False
    return not torch.is_grad_enabled() or not _requires_grad(tensors)


def _requires_grad(tensors: Any) -> bool:
    # The plain containers by hand: in a small step torch's walk over trees would be felt.
    if isinstance(tensors, Tensor):
        return tensors.requires_grad
    if isinstance(tensors, dict):
        return any(map(_requires_grad, tensors.values()))
    if type(tensors) in (tuple, list):
        return any(map(_requires_grad, tensors))
    return any(isinstance(x, Tensor) and x.requires_grad for x in tree.leaves(tensors))
