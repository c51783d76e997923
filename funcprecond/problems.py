"""What is minimised: a model, a loss, and the parameters to start from."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from funcprecond import tree
from funcprecond.losses import Loss, as_loss

__all__ = ["Buffers", "Params", "Problem", "as_pair", "problem"]

Params = dict[str, Tensor]
Buffers = dict[str, Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A model and a loss as pure functions; make one with :func:`problem`.

    ``problem(params, inputs)`` runs the model.

    Attributes:
        forward: ``(params, buffers, inputs) -> (outputs, new buffers)``, mutating nothing.
        loss: what is minimised, see :mod:`funcprecond.losses`.
        params: the trainable parameters to start from, by name.
        buffers: the model's buffers to start from, by name (running statistics of BatchNorm).
        split: ``batch -> (inputs, targets)``.
        module: the ``nn.Module`` that ``forward`` runs, or None for a plain function.
        draws_masks: whether a run draws dropout masks, in train and in eval mode, as far as is known.
    """

    forward: Callable[[Params, Buffers, Any], tuple[Any, Buffers]]
    loss: Loss
    params: Params
    buffers: Buffers
    split: Callable[[Any], tuple[Any, Any]]
    module: nn.Module | None = None
    draws_masks: dict[bool, bool] = dataclasses.field(default_factory=dict)

    def __call__(self, params: Params, inputs: Any, buffers: Buffers | None = None) -> Any:
        """The model's outputs at ``params``, in the mode (train or eval) the module is in."""
        return self.forward(params, self.buffers if buffers is None else buffers, inputs)[0]

    def couples_examples(self) -> str | None:
        """The layer that makes one example's output depend on the others, if a module has one."""
        for name, module in self.module.named_modules() if self.module else ():
            if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                continue
            if module.training:
                return f"{type(module).__name__} {name!r} in training mode"
            if module.running_mean is None:
                return f"{type(module).__name__} {name!r} without running statistics"
        return None


def as_pair(batch: Any) -> tuple[Any, Any]:
    """``batch -> (inputs, targets)`` for batches that are pairs.

    Raises:
        TypeError: the batch is not a pair.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    length = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    msg = (
        f"the batch is a {type(batch).__name__}{length}, not a pair (inputs, targets): pass "
        "split=, a function from your batch to that pair, to fp.problem"
    )
    raise TypeError(msg)


def problem(
    model: nn.Module | Callable[[Params, Any], Any],
    loss: Any,
    *,
    params: Mapping[str, Tensor] | None = None,
    split: Callable[[Any], tuple[Any, Any]] = as_pair,
) -> Problem:
    """State a training problem.

    Args:
        model: an ``nn.Module``, or any function ``(params, inputs) -> outputs`` of a dict of
            tensors. A module's inputs may be one tensor, a tuple (its positional arguments) or a
            dict (its keyword arguments); its own parameters and buffers are never changed.
            Parameters with ``requires_grad=False`` are constants; tied ones appear once.
        loss: one of :mod:`funcprecond.losses`, one of torch's losses, or any callable
            ``(outputs, targets) -> 0-d tensor``.
        params: where to start, for a plain function; a module brings its own.
        split: ``batch -> (inputs, targets)``; the default takes pairs. A batch is opaque otherwise.

    Returns:
        A :class:`Problem`.

    Raises:
        TypeError: ``model`` or ``loss`` is not callable, a module was given with ``params``, or it
            is one that hides the modules within (scripted, ``nn.DataParallel``).
        ValueError: a trainable parameter is not floating point, or has no storage yet.
    """
    loss = as_loss(loss)
    if isinstance(model, nn.Module):
        if params is not None:
            msg = "a module brings its own params: pass params= only with a plain function"
            raise TypeError(msg)
        if isinstance(model, (torch.jit.ScriptModule, nn.DataParallel)):
            msg = f"the layers of a {type(model).__name__} cannot be seen: pass the module in it"
            raise TypeError(msg)
        return _from_module(model, loss, split)
    if not callable(model):
        msg = f"the model must be an nn.Module or a function, not a {type(model).__name__}"
        raise TypeError(msg)
    try:
        inspect.signature(model).bind({}, None)
    except TypeError as error:
        msg = f"a model that is a function takes (params, inputs): {error}"
        raise TypeError(msg) from None

    def forward(params, buffers, inputs):
        return model(params, inputs), buffers

    return Problem(forward, loss, _trainable(params or {}), {}, split)


def _from_module(model: nn.Module, loss: Loss, split: Callable) -> Problem:
    named = dict(model.named_parameters())
    frozen = {k: p.detach() for k, p in named.items() if not p.requires_grad}
    start = _trainable({k: p for k, p in named.items() if p.requires_grad})
    start_buffers = {k: b.detach().clone() for k, b in model.named_buffers()}
    # A set of its own: a compiler would guard on ``params is start``, and compile the second step
    # anew.
    names, buffer_names = frozenset(start), frozenset(start_buffers)
    # One name for all places of a tied tensor. Found once: torch's ``functional_call`` would search
    # the module for them at each call, which a small step feels.
    name_of = {id(x): name for name, x in (*named.items(), *model.named_buffers())}
    places = [(*place, name_of[id(x)]) for place, x in _places(model)]

    def forward(params, buffers, inputs):
        _fit("params", params, names)
        _fit("buffers", buffers, buffer_names)
        # Layers write into the buffers they are given: into clones, made where a transform sees
        # them.
        fresh = {k: b.clone() for k, b in buffers.items()}
        tensors = {**frozen, **params, **fresh}
        args, kwargs = _arguments(inputs)
        own = [held[key] for held, key, _ in places]
        try:
            for held, key, name in places:
                held[key] = tensors[name]
            outputs = model(*args, **kwargs)
            # A layer may also put a new tensor in a buffer's place. One that it takes away is back
            # in the next run, as it was.
            found = ((name, held.get(key)) for held, key, name in places if name in fresh)
            fresh |= {name: x for name, x in found if x is not None}
        finally:
            for (held, key, _), tensor in zip(places, own, strict=True):
                held[key] = tensor
        return outputs, fresh

    return Problem(forward, loss, start, start_buffers, split, model)


def _fit(what: str, given: Mapping[str, Tensor], names: frozenset[str]) -> None:
    if given.keys() != names:
        missing, unknown = names - given.keys(), given.keys() - names
        msg = (
            f"{what} do not fit the model: missing {sorted(missing) or 'none'}, "
            f"unknown {sorted(unknown) or 'none'}"
        )
        raise KeyError(msg)


def _places(model: nn.Module) -> list[tuple[tuple[dict, str], Tensor]]:
    """Every place that holds a parameter or a buffer, a dict and a key; and what it holds."""
    return [
        ((held, key), tensor)
        for module in model.modules()
        for held in (module._parameters, module._buffers)
        for key, tensor in held.items()
        if tensor is not None
    ]


def _arguments(inputs: Any) -> tuple[tuple, dict]:
    if isinstance(inputs, tuple):
        return inputs, {}
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})


def _trainable(params: Mapping[str, Tensor]) -> Params:
    for name, p in params.items():
        if not isinstance(p, Tensor) or not p.is_floating_point():
            kind = p.dtype if isinstance(p, Tensor) else type(p).__name__
            msg = f"parameter {name!r} must be a floating-point tensor, not {kind}"
            raise ValueError(msg)
        if isinstance(p, nn.parameter.UninitializedParameter):
            msg = f"parameter {name!r} has no shape yet: run the lazy module once on a batch first"
            raise ValueError(msg)
    # Copies, so that nothing that happens to the module later reaches them.
    return {name: p.detach().clone() for name, p in params.items()}


def example_count(outputs: Any) -> int:
    """N, the length of axis 0 of the outputs.

    Raises:
        ValueError: the outputs have no example axis, or it is empty.
    """
    leaves = [outputs] if isinstance(outputs, Tensor) else tree.leaves(outputs)
    first = next(x for x in leaves if isinstance(x, Tensor))
    if first.ndim == 0 or first.shape[0] == 0:
        msg = (
            f"the model's outputs have shape {tuple(first.shape)}: axis 0 must count the batch's "
            "examples, at least one"
        )
        raise ValueError(msg)
    return first.shape[0]


def detach(tensors: Any) -> Any:
    """The same tree without a graph."""
    if isinstance(tensors, Tensor):
        return tensors.detach()
    return tree.map(lambda x: x.detach() if isinstance(x, Tensor) else x, tensors)
