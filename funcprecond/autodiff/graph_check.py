"""What the graph of a run tells about derivatives that would be lost without an error."""

import functools
import types
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

__all__ = ["Unchanged", "check_graph", "check_recording", "no_checkpoints", "nodes"]

# The number of objects among which the owner of a tensor is searched.
HELD = 10_000
CHECKPOINTED = (
    "activation checkpointing recomputes a layer at the module's own parameters, not at the "
    "parameters that were passed in: switch it off in the model (torch.utils.checkpoint, or "
    "gradient_checkpointing_disable() in transformers), and use smaller batches"
)


def check_recording() -> None:
    """Raise RuntimeError under ``torch.inference_mode``, where autograd records nothing."""
    if torch.is_inference_mode_enabled():
        msg = "nothing can be differentiated under torch.inference_mode: use torch.no_grad instead"
        raise RuntimeError(msg)


class Unchanged:
    """A check that a model writes neither into its parameters nor into its inputs.

    Args:
        params: the parameters of the run.
        inputs: the leaves of its inputs.
    """

    def __init__(self, params: Mapping[str, Tensor], inputs: Sequence[Any]):
        self._params, self._inputs = params, inputs
        self._versions = self._now()

    def _now(self) -> list[int]:
        tensors = [*self._params.values(), *(x for x in self._inputs if isinstance(x, Tensor))]
        # Tensors that were made under inference mode do not count their changes.
        return [-1 if x.is_inference() else x._version for x in tensors]

    def check(self) -> None:
        """Raise RuntimeError if a tensor was changed since the start."""
        now = self._now()
        if now == self._versions:
            return
        i = next(i for i, (a, b) in enumerate(zip(now, self._versions, strict=True)) if a != b)
        names = [*self._params]
        what = f"parameter {names[i]!r}" if i < len(names) else f"input {i - len(names)}"
        msg = (
            f"the model has changed its {what} in place, which is also the caller's tensor and is "
            "used again: write the model so that it changes a copy, such as x.clone()"
        )
        raise RuntimeError(msg)


def no_checkpoints() -> AbstractContextManager:
    """Make activation checkpointing raise an error, because it recomputes at other parameters."""
    if torch.compiler.is_compiling():
        return nullcontext()
    return torch.autograd.graph.disable_saved_tensors_hooks(CHECKPOINTED)


def nodes(outputs: Sequence[Tensor]) -> Iterator[Any]:
    """All nodes of the graph of some tensors."""
    stack = [x.grad_fn for x in outputs if x.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)


def check_graph(
    outputs: Sequence[Tensor],
    leaves: Container[int],
    users: Sequence[Any],
    *,
    closed: bool,
    twice: bool,
) -> None:
    """Raise an error if a derivative would be lost.

    Args:
        outputs: the tensors whose graph is examined, at two microseconds per node.
        leaves: the identities of the tensors that are differentiated, by the caller or by the run
            itself.
        users: the functions and modules that were run.
        closed: whether other tensors that require a gradient, and that the users hold, are refused.
        twice: whether the graph of the pull-back is differentiated.

    Raises:
        ValueError: the graph has another leaf than ``leaves``, and a user holds it.
        NotImplementedError: a function's own backward gives a constant.
        RuntimeError: the graph has a reentrant checkpoint.
    """
    for node in nodes(outputs):
        if closed and (leaf := getattr(node, "variable", None)) is not None:
            if id(leaf) not in leaves and (message := _foreign(leaf, users)) is not None:
                raise ValueError(message)
        elif type(node).__name__ == "CheckpointFunctionBackward":
            raise RuntimeError(CHECKPOINTED)
        elif twice and isinstance(node, BackwardCFunction) and _is_constant(node):
            name = type(node).__name__.removesuffix("Backward")
            msg = (
                f"the function {name} cannot be differentiated twice, because the result of its "
                "backward has no derivative: it may be differentiated once only, or it is computed "
                "without gradients. Write its backward, or all of it, with torch operations; or "
                "use a curvature that needs only gradients, such as a KroneckerFactored with "
                "labels='empirical'"
            )
            raise NotImplementedError(msg)


def _foreign(leaf: Tensor, users: Sequence[Any]) -> str | None:
    modules = [x for x in users if isinstance(x, nn.Module)]
    for name, p in (item for module in modules for item in module.named_parameters()):
        if p is leaf:
            return (
                f"the model uses its parameter {name!r} otherwise than through the module on which "
                "its forward is called, such as through a closure that was made in __init__, so "
                "that it would stay constant: use self in forward"
            )
    if not any(x is leaf for user in users for x in _held(user, set())):
        return None
    return (
        f"the model or the loss depends on a tensor of the shape {tuple(leaf.shape)} that requires "
        "a gradient and is no parameter of the problem, so that its gradient would be lost: detach "
        "it, or call requires_grad_(False) on the module that it belongs to; to differentiate in "
        "it, pass it as a part of the batch"
    )


def _held(x: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors that a function, a module or a container refers to."""
    if id(x) in seen or len(seen) > HELD or isinstance(x, (str, bytes, type, types.ModuleType)):
        return
    seen.add(id(x))
    if isinstance(x, Tensor):
        yield x
        return
    if isinstance(x, functools.partial):
        parts = [x.func, *x.args, *x.keywords.values()]
    elif isinstance(x, types.MethodType):
        parts = [x.__self__, x.__func__]
    elif isinstance(x, types.FunctionType):
        names, known = x.__code__.co_names, x.__globals__
        cells = [c.cell_contents for c in x.__closure__ or () if c != types.CellType()]
        parts = [*cells, *(x.__defaults__ or ()), *(known[k] for k in names if k in known)]
    elif isinstance(x, dict):
        parts = list(x.values())
    elif isinstance(x, (list, tuple)):
        parts = list(x)
    else:
        parts = list(getattr(x, "__dict__", {}).values())
    for part in parts:
        yield from _held(part, seen)


def _is_constant(node: Any) -> bool:
    """Whether the backward of a custom function does not depend on the output gradients."""
    if node._forward_cls.__module__.startswith("funcprecond."):
        return False
    with torch.enable_grad():
        given = [
            torch.ones(x.shape, dtype=x.dtype, device=x.device, requires_grad=True)
            for x in node._input_metadata
            if x.dtype.is_floating_point or x.dtype.is_complex
        ]
        try:
            found = node.apply(*given)
        except Exception:
            return False
        found = [found] if isinstance(found, Tensor) else found
        values = [x for x in found if isinstance(x, Tensor) and bool(x.detach().any())]
        if not values:
            return False
        alive = [x.sum() for x in values if x.requires_grad]
        reached = torch.autograd.grad(alive, given, allow_unused=True) if alive else [None]
        return all(x is None for x in reached)
