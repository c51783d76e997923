"""Tests of whether a transform, a compiler or autograd traces the calling code.

Eager code may stop a loop early, write over its own temporaries, and use the library's own
derivatives. Traced code (under ``torch.func`` transforms, ``torch.compile``, forward mode or an
outer autograd graph) may not. The functions here distinguish the two.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import (
    retrieve_all_functorch_interpreters,
    retrieve_current_functorch_interpreter,
)
from torch.autograd import forward_ad
from torch.func import debug_unwrap

from funcprecond import tree

__all__ = [
    "in_transform",
    "is_eager",
    "is_traced",
    "multi_tensor",
    "transform_level",
    "unseen_by_modes",
]


def in_transform() -> bool:
    """Whether the calling code runs under a ``torch.func`` transform."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore


def transform_level() -> tuple[int, int]:
    """How many transforms the calling code runs under: of ``torch.func``, and of forward mode."""
    # This spelling is the one that a compiler can trace.
    level = retrieve_current_functorch_interpreter().level() if in_transform() else 0
    return level, forward_ad._current_level


def is_traced() -> bool:
    """Whether a transform, a compiler or forward mode requires torch's own derivatives."""
    return torch.compiler.is_compiling() or in_transform() or forward_ad._current_level >= 0


def is_eager(tensors: Any) -> bool:
    """Whether nothing traces a call: no compiler, no transform, and no outer graph.

    Args:
        tensors: a tree of all arguments of the call. There is an outer graph if gradients are
            enabled and one of these tensors requires a gradient.
    """
    if is_traced():
        return False
    return not torch.is_grad_enabled() or not _requires_grad(tensors)


def is_differentiated(tensors: Any) -> bool:
    """Whether somebody may ask for derivatives of a call: a transform, forward mode or autograd.

    Args:
        tensors: a tree of all arguments of the call.
    """
    if forward_ad._current_level >= 0:
        return True
    if in_transform():
        if torch.compiler.is_compiling():
            return True
        levels = retrieve_all_functorch_interpreters()
        if any(level.key() != TransformType.Vmap for level in levels):
            return True
        tensors = tree.map(lambda x: debug_unwrap(x) if isinstance(x, Tensor) else x, tensors)
    return torch.is_grad_enabled() and _requires_grad(tensors)


def multi_tensor(*values: Iterable[Any]) -> bool:
    """Whether torch's multi-tensor operations may take ``values`` and change results in place.

    They may not in three cases: under a ``torch.func`` transform, which has no rules for them;
    where autograd records, because it may keep a result for its backward pass; and if ``values``
    contain no tensor.

    Args:
        *values: collections of tensors and other values.
    """
    if in_transform():
        return False
    tensors = [x for row in values for x in row if isinstance(x, Tensor)]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return len(tensors) > 0 and not recorded


def _requires_grad(tensors: Any) -> bool:
    # Plain containers are searched directly, because torch's traversal of trees slows small steps.
    if isinstance(tensors, Tensor):
        return tensors.requires_grad
    if isinstance(tensors, dict):
        return any(map(_requires_grad, tensors.values()))
    if type(tensors) in (tuple, list):
        return any(map(_requires_grad, tensors))
    return any(isinstance(x, Tensor) and x.requires_grad for x in tree.leaves(tensors))


def unseen_by_modes() -> AbstractContextManager:
    """A ``with`` block whose calls no ``TorchFunctionMode`` intercepts."""
    return torch._C.DisableTorchFunction()
