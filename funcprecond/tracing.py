"""Whether a transform, a compiler or autograd is tracing the code that asks.

Eager code may stop a loop early, write over its own temporaries, and use derivatives of our own.
Under ``torch.func`` transforms, ``torch.compile``, forward mode or an outer autograd graph it may
not; the functions here tell the two apart.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from funcprecond import tree

__all__ = ["in_transform", "is_eager", "is_traced", "multi_tensor"]


def in_transform() -> bool:
    """Whether a ``torch.func`` transform is running the code that asks."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore


def is_traced() -> bool:
    """Whether a transform, a compiler or forward mode wants torch's own rules of differentiation."""
    return torch.compiler.is_compiling() or in_transform() or forward_ad._current_level >= 0


def is_eager(tensors: Any) -> bool:
    """Whether nothing traces a call: no compiler, no transform, and no outer graph.

    Args:
        tensors: a tree of all that goes into the call. An outer graph is there where gradients are
            enabled and one of these tensors requires one.
    """
    if is_traced():
        return False
    return not torch.is_grad_enabled() or not _requires_grad(tensors)


def multi_tensor(*values: Iterable[Any]) -> bool:
    """Whether torch's multi-tensor operations can take ``values`` and change results in place.

    They cannot in a ``torch.func`` transform, which has no rules for them; nor where autograd
    records, because it may keep a result for its backward pass; nor if there is no tensor.
    """
    if in_transform():
        return False
    tensors = [x for row in values for x in row if isinstance(x, Tensor)]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return len(tensors) > 0 and not recorded


def _requires_grad(tensors: Any) -> bool:
    # The plain containers by hand: in a small step torch's walk over trees would be felt.
    if isinstance(tensors, Tensor):
        return tensors.requires_grad
    if isinstance(tensors, dict):
        return any(map(_requires_grad, tensors.values()))
    if type(tensors) in (tuple, list):
        return any(map(_requires_grad, tensors))
    return any(isinstance(x, Tensor) and x.requires_grad for x in tree.leaves(tensors))
