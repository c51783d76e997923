"""Errors for derivatives that torch lacks, with the name of the layer and a way around it."""

import functools
import re
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from funcprecond import tree
from funcprecond.functional_module import path_of
from funcprecond.tracing import in_transform

__all__ = ["explained"]

Method = TypeVar("Method", bound=Callable)

_MISSING = re.compile(r"derivative for '?(?:aten::)?(\w+?)(_backward)?'? is not implemented")
# The error of a kernel without a rule for torch.func, such as that of CTC with lengths as tuples.
_STORAGE = "Tensor that doesn't have storage"
_OTHER = ("FlexAttention does not support", "cudnn RNN backward", "once_differentiable", _STORAGE)
# The errors of a layer that writes into a buffer that all members of a vmapped ensemble share.
_SHARED = re.compile("which will be updated in place, were not batched|vmap: inplace arithmetic")
# The error of a model that calls torch.autograd.grad under a transform.
_INSIDE = "Tensor.requires_grad_()"
# The advice for a part of the operation's name, or of torch's message.
_WAYS = {
    "cudnn": "run it within torch.backends.cudnn.flags(enabled=False)",
    "flexattention": "use F.scaled_dot_product_attention, or matrix products and a softmax",
    "scaleddotproduct": "run it within torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
    "ctcloss": "write the loss out with logsumexp, or, for gradients, pass its lengths as tensors",
    "embeddingbag": "use an Embedding, and the mean or the sum of the vectors that it returns",
    "cdist": "write the distances out, (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1).sqrt()",
    "oncedifferentiable": "make its backward differentiable, or write it out with torch operations",
}


def explained(method: Method) -> Method:
    """Decorate a function, such that errors about missing derivatives are explained.

    Args:
        method: the function. Its first argument is an :class:`funcprecond.Evaluation`, or a
            function of parameters; these are then the second argument.

    Returns:
        A function of the same arguments. It raises a NotImplementedError if torch cannot
        differentiate a part of the model or the loss as often as required; torch's error is its
        cause.
    """

    @functools.wraps(method)
    def call(subject, *args, **kwargs):
        if torch.compiler.is_compiling():
            return method(subject, *args, **kwargs)
        try:
            return method(subject, *args, **kwargs)
        except RuntimeError as error:
            if _SHARED.search(str(error)) and in_transform():
                raise RuntimeError(_of_buffers(error)) from error
            if _INSIDE in str(error) and in_transform():
                msg = (
                    f"{_raised_in(error) or 'the model'} takes derivatives of its own with "
                    "torch.autograd, which cannot run under vmap, grad or jvp: use "
                    "torch.func.grad, vjp or jvp in its forward"
                )
                raise RuntimeError(msg) from error
            missing = _MISSING.search(str(error))
            known = missing is not None or any(part in str(error) for part in _OTHER)
            if not known or error.__cause__ is not None:
                raise
            operation = _plain(missing.group(1)) if missing else _called(error)
            where = _raised_in(error) or _made_in(operation, subject, *args[:1])
            raise NotImplementedError(_sentence(where, operation, str(error))) from error

    return call  # pyright: ignore[reportReturnType]


def _sentence(where: str, operation: str, message: str) -> str:
    ways = [way for part, way in _WAYS.items() if part in operation + _plain(message)]
    way = ways[0] if ways else "write it out with operations that have derivatives"
    torchs = message.splitlines()[0].split(". ")[0].rstrip(".")
    missing = _MISSING.search(message)
    # Under a transform, such a kernel does not even have a first derivative.
    stored = _STORAGE in message and not in_transform()
    twice = "once_differentiable" in message or stored
    if not twice and not (missing and missing.group(2)):
        return f"{where} cannot be differentiated here: {way} (torch: {torchs})"
    return (
        f"{where} cannot be differentiated twice: {way}; or use a curvature that needs only "
        "gradients, fp.KroneckerFactored or fp.DiagonalGGN, with labels='empirical' if the "
        f"likelihood of the loss is not known (torch: {torchs})"
    )


def _of_buffers(error: BaseException) -> str:
    where = _raised_in(error) or "the model"
    return (
        f"{where} writes into its buffers, which all members of the vmapped ensemble share: stack "
        "one copy of problem.buffers for each member, and pass the stack through vmap as "
        "step(params, state, batch, t, noise, buffers)"
    )


def _called(error: BaseException) -> str:
    """The last function of ``torch.nn.functional`` in the traceback, or an empty string."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    names = [f.f_code.co_name for f in frames if f.f_globals.get("__name__") == F.__name__]
    return _plain(names[-1]) if names else ""


def _raised_in(error: BaseException) -> str | None:
    """Describe the innermost layer in whose forward the error was raised; None if there is none."""
    owner, step = None, error.__traceback__
    while step is not None:
        caller = step.tb_frame.f_locals.get("self")
        if isinstance(caller, nn.Module) and path_of(caller) is not None:
            owner = caller
        step = step.tb_next
    return None if owner is None else _layer(owner)


def _made_in(operation: str, subject: Any, params: Any = None) -> str:
    """Describe the innermost layer that makes the operation, or the loss, by one more run."""
    is_function = not hasattr(subject, "problem")
    outermost = "the function" if is_function else "the model"
    if not operation or in_transform():
        return outermost if is_function else "the model or its loss"
    seen, running, found = set(), [], []

    def makes(tensors: Any) -> bool:
        """Whether the graph of these tensors has the operation among its new nodes."""
        stack = [x.grad_fn for x in tree.leaves(tensors) if isinstance(x, Tensor)]
        new = False
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            name = _plain(node.name()).rstrip("0123456789").removesuffix("backward")
            new = new or operation.startswith(name)
            stack += [following for following, _ in node.next_functions]
        return new

    def note(tensors: Any) -> None:
        if not found and makes(tensors):
            found.append(_layer(running[-1]) if running else outermost)

    def enter(module, inputs):
        note(inputs)
        running.append(module)

    def leave(module, inputs, outputs):
        note(outputs)
        running.pop()

    params = params if is_function else subject.params
    params = tree.map(lambda p: p.detach().requires_grad_(), params)
    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        with torch.enable_grad():
            note(subject(params) if is_function else subject._forward(params, None)[0])
    finally:
        for hook in hooks:
            hook.remove()
    if found or is_function:
        return found[0] if found else outermost
    return _loss(subject.problem.loss)


def _loss(loss: Any) -> str:
    """Describe a loss by the name of its function, if it has one."""
    function = getattr(loss, "function", loss)
    return f"the loss {getattr(function, '__name__', function)}"


def _layer(module: nn.Module) -> str:
    name, kind = path_of(module), type(module).__name__
    if name is None:
        return f"a layer ({kind})"
    return f"layer {name!r} ({kind})" if name else f"the model ({kind})"


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
